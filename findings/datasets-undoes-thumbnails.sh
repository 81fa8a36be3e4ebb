#!/usr/bin/env bash
# Versions: datasets 5.2.0, Pillow 13.0.0
# Behaviour: datasets stores a Pillow image that was opened from a file as the path of that file. What changed the image
#   in place (`thumbnail`, `paste`, `putpixel`, `ImageDraw`) is lost: the row holds the image as it is on the disk.
#   `resize` and `convert` return images without a file; those are stored as they are.
# Guess: what is stored is the image that was handed over.
# Seen: thumbnails of 48 pixels come back with 96; a painted-over face, a black square, comes back as it was.
# Advice: hand over image.copy(), or use functions that return a new image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/pillow-13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==13.0.0 datasets==5.2.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
pixels = np.random.default_rng(0).integers(1, 256, (96, 96, 3)).astype(np.uint8)
Image.fromarray(pixels).save("face.png")


def stored(change, copy=False):
    def rows():
        image = Image.open("face.png")
        image = change(image) or image
        yield {"image": image.copy() if copy else image}

    return datasets.Dataset.from_generator(rows, features=datasets.Features({"image": datasets.Image()}))[0]["image"]


def thumbnail(image):
    image.thumbnail((48, 48))


def mask(image):
    image.paste((0, 0, 0), (32, 32, 64, 64))


kept = {"thumbnail": stored(thumbnail).size, "resize": stored(lambda image: image.resize((48, 48))).size}
print(kept, "mean inside the mask", np.asarray(stored(mask))[32:64, 32:64].mean().round())
assert kept == {"thumbnail": (96, 96), "resize": (48, 48)}
assert (np.asarray(stored(mask)) == pixels).all()
assert stored(thumbnail, copy=True).size == (48, 48) and (np.asarray(stored(mask, copy=True))[32:64, 32:64] == 0).all()
PY
