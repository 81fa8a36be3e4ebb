#!/usr/bin/env bash
# Versions: Pillow 13.0.0, datasets 5.2.0
# Behaviour: converting a 16-bit grey image to RGB or L clips at 255 instead of dividing by 257, and `Image(mode="RGB")`
#   of datasets does the same: an infrared or X-ray set of 16-bit PNG trains as white images.
# Guess: the values are scaled to 8 bits.
# Seen: 0, 200, 300, 30000, 65535 become 0, 200, 255, 255, 255 in all three.
# Advice: divide by 257 before the conversion.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pillow==13.0.0 datasets==5.2.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import io

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as Pillow

file = io.BytesIO()
Pillow.fromarray(np.array([[0, 200, 300, 30000, 65535]], np.uint16)).save(file, "PNG")
features = Features({"image": Image(mode="RGB")})
row = Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)[0]
opened = Pillow.open(file)
seen = [
    np.asarray(opened.convert("RGB"))[0, :, 0].tolist(),
    np.asarray(opened.convert("L"))[0].tolist(),
    np.asarray(row["image"])[0, :, 0].tolist(),
]
print(opened.mode, *seen)
assert all(values == [0, 200, 255, 255, 255] for values in seen)
PY
