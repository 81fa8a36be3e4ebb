#!/usr/bin/env bash
# Versions: Pillow 12.3.0, numpy 2.4.6
# Behaviour: a grey TIFF says whether 0 is black or white (tag 262). Pillow turns 8-bit images whose white is 0 into the
#   usual order when it reads them, and leaves those of 16 bits as negatives, with nothing on the image but the tag.
# Guess: the tag is honoured at every depth, or at none.
# Seen: pixels 0 and maximum, white is 0: of 8 bits they are read as 255 and 0, of 16 bits as 0 and 65535.
# Advice: look at `image.tag_v2[262]` of 16-bit grey TIFFs and turn those with 0; scanners and microscopes write them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/pillow-12.3
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==12.3.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" -W ignore - <<'PY'
import struct

import numpy as np
from PIL import Image


def tiff(pixels, white_is_zero):
    """A little-endian grey TIFF of one uncompressed strip."""
    height, width = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1, 278: height}
    tags |= {273: 8, 279: pixels.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHI", b"II", 42, 8 + pixels.nbytes)
    return header + pixels.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


read = {}
for kind in (np.uint8, np.uint16):
    most = np.iinfo(kind).max
    pixels = np.array([[0, most]], dtype=kind)
    for white_is_zero in (False, True):
        with open("grey.tif", "wb") as file:
            file.write(tiff(pixels, white_is_zero))
        with Image.open("grey.tif") as image:
            read[kind.__name__, white_is_zero] = np.asarray(image).ravel().tolist()
for (kind, white_is_zero), values in read.items():
    print(kind, "white is 0:" if white_is_zero else "black is 0:", values)
assert read["uint8", False] == [0, 255] and read["uint16", False] == [0, 65535]
assert read["uint8", True] == [255, 0]
assert read["uint16", True] == [0, 65535]
PY
