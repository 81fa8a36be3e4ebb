#!/usr/bin/env bash
# Versions: torch 2.14.1, torchvision 0.29.1, litdata 0.2.76, mosaicml-streaming 0.13.0, pillow 12.3.0
# Behaviour: both formats for streamed training data store a Pillow image as its mode, its size and its bytes: MDS with
#   the encoding "pil", litdata for every image that is no JPEG file. For an image with a palette, as many PNG and all
#   GIF files are, the bytes are places in the palette, and the palette is not stored. Reading makes an image of mode
#   "P" whose palette is the ramp of greys, with no word at either end.
# Guess: formats that store pixels uncompressed return the image that was put in.
# Seen: a gradient in 64 colours comes back in dark greys, 105 of 255 levels off on average in both formats; true-colour
#   images come back as they were. "png" in MDS keeps the palette.
# Advice: image.convert("RGB") before writing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.14
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.1.3 pillow==12.3.0 litdata==0.2.76 \
  mosaicml-streaming==0.13.0
cd "$folder"
cat > script.py <<'PY'
import sys

import litdata
import numpy as np
from PIL import Image
from streaming import MDSWriter, StreamingDataset


def sample(index):
    return {"image": Image.open(f"{index}.png")}


def array(image):
    return np.asarray(image.convert("RGB")).astype(int)


def write():
    x, y = np.mgrid[:64, :64] * 4
    for index, blue in enumerate((0, 128)):
        image = Image.fromarray(np.stack([x, y, np.full_like(x, blue)], 2).astype(np.uint8))
        image.save(f"{2 * index}.png")
        image.quantize(64).save(f"{2 * index + 1}.png")
    for encoding in ("pil", "png"):
        with MDSWriter(out=f"mds-{encoding}", columns={"image": encoding}, size_limit=None) as writer:
            for index in range(4):
                writer.write(sample(index))
    litdata.optimize(sample, list(range(4)), "litdata", chunk_bytes="64MB", num_workers=1)


def read():
    stored = {
        "MDS pil": StreamingDataset(local="mds-pil", batch_size=1),
        "MDS png": StreamingDataset(local="mds-png", batch_size=1),
        "litdata": litdata.StreamingDataset("litdata"),
    }
    for name, dataset in stored.items():
        seen = {"RGB": [], "P": []}
        for index in range(4):
            before, after = sample(index)["image"], dataset[index]["image"]
            assert after.mode == before.mode
            seen[after.mode].append(np.abs(array(before) - array(after)).mean())
        error = {mode: np.mean(values) for mode, values in seen.items()}
        print(f"{name}: mean error of RGB images {error['RGB']:.1f}, of images with a palette {error['P']:.1f}")
        assert error["RGB"] == 0 and (error["P"] == 0 if name == "MDS png" else error["P"] > 30)


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else read()
PY
export OMP_NUM_THREADS=1
"$venv/bin/python" -W ignore script.py write > log 2>&1 || { cat log; exit 1; }
"$venv/bin/python" -W ignore script.py read
