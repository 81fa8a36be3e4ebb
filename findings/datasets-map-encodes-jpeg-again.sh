#!/usr/bin/env bash
# Versions: datasets 5.2.0, Pillow 13.0.0
# Behaviour: `map` writes every image that its function has looked at as a new file: a JPEG as a JPEG of Pillow's
#   default quality of 75 with halved colour. A function that reads the width and returns nothing else costs the images
#   their detail. With input_columns, or where the image is not read, the bytes stay. A resized image is written as PNG,
#   one shrunk by `thumbnail`, which is still a JPEG to Pillow, is compressed again.
# Guess: a column that is not returned is not touched; pixels that are returned are kept.
# Seen: noise at quality 95, 4:4:4: reading its width leaves 21 % of the bytes and a mean error of 15 levels;
#   thumbnail 6; input_columns and resize 0.
# Advice: name input_columns, or cast to Image(decode=False) first; save as PNG yourself where pixels matter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/pillow-13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==13.0.0 datasets==5.2.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import io

import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
pixels = np.random.default_rng(0).normal(128, 20, (96, 96, 3)).clip(0, 255).astype(np.uint8)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
features = datasets.Features({"image": datasets.Image()})
data = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)


def thumbnail(row):
    row["image"].thumbnail((48, 48))
    return row


def error(mapped, image):
    return abs(np.asarray(mapped[0]["image"]).astype(int) - np.asarray(image).astype(int)).mean().item()


image = data[0]["image"]
read = data.map(lambda row: {"width": row["image"].width})
seen = {
    "width read": error(read, image),
    "width read, input_columns": error(data.map(lambda x: {"width": x.width}, input_columns=["image"]), image),
    "thumbnail": error(data.map(thumbnail), thumbnail(data[0])["image"]),
    "resize": error(data.map(lambda row: {"image": row["image"].resize((48, 48))}), image.resize((48, 48))),
}
print("mean error in levels:", {name: round(value, 1) for name, value in seen.items()})
size = len(read.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"])
print(len(file.getvalue()), "bytes become", size)
assert seen["width read"] > 5 and seen["thumbnail"] > 2 and size < 0.5 * len(file.getvalue())
assert seen["width read, input_columns"] == seen["resize"] == 0
PY
