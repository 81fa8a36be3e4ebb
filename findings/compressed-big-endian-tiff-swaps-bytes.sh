#!/usr/bin/env bash
# Versions: Pillow 13.0.0 (12.3.0 is alike), numpy 2.4.6
# Behaviour: Pillow reads a big-endian TIFF of one channel in signed 16 bits, signed 32 bits or float32 with its bytes in
#   the wrong order once the strips are compressed: libtiff has swapped them already, and they are swapped again. No
#   error, no warning. The same pixels without compression, and unsigned 16 bits, are right.
# Guess: compression changes the size of a file and no pixel.
# Seen: 1, 8, 15 become 256, 2048, 3840 (16 bits), 16777216, 134217728, 251658240 (32 bits), and 4.6e-41, 9.1e-44,
#   4.0e-41 (float32), so that a float image looks black.
# Advice: read such files of satellites and microscopes with tifffile, or write them little-endian.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/pillow-13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PY'
import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = {"u": 1, "i": 2, "f": 3}
SHORT, LONG = 3, 4


def tiff(pixels, compressed):
    """A big-endian TIFF of one grey channel in one strip, by the TIFF 6.0 specification."""
    raw = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    strip = zlib.compress(raw) if compressed else raw
    rows, columns = pixels.shape
    tags = [
        (256, SHORT, columns),
        (257, SHORT, rows),
        (258, SHORT, 8 * pixels.dtype.itemsize),  # bits per sample
        (259, SHORT, 8 if compressed else 1),  # Adobe deflate, or none
        (262, SHORT, 1),  # black is zero
        (273, LONG, 8),  # where the strip is
        (277, SHORT, 1),  # samples per pixel
        (278, SHORT, rows),
        (279, LONG, len(strip)),
        (339, SHORT, FORMATS[pixels.dtype.kind]),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == SHORT else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    strip += b"\0" * (len(strip) % 2)
    return b"MM\0*" + struct.pack(">I", 8 + len(strip)) + strip + struct.pack(">H", len(tags)) + entries + bytes(4)


seen = {}
for name in ("uint8", "uint16", "int16", "int32", "float32"):
    pixels = (np.arange(12).reshape(3, 4) * 7 + 1).astype(name)
    for compressed in (False, True):
        read = np.asarray(Image.open(io.BytesIO(tiff(pixels, compressed))))
        seen[name, compressed] = bool(np.array_equal(read, pixels))
        print(name, "deflate" if compressed else "plain", "right" if seen[name, compressed] else f"wrong: {read.ravel()[:3]}")
wrong = {("int16", True), ("int32", True), ("float32", True)}
assert seen == {key: key not in wrong for key in seen}
PY
