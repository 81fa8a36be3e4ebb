#!/usr/bin/env bash
# Versions: torch 2.13.0, Pillow 13.0.0
# Behaviour: `interpolate(mode="bicubic")` uses another cubic kernel with antialias=True (a = -0.5, Pillow's) than
#   without (a = -0.75), so the switch changes an enlargement, where there is nothing to filter. 64 to 224 pixels, the
#   way to a feature network, differs by up to 22 grey levels on noise.
# Guess: antialiasing only acts when an image gets smaller; enlarged images are equal, as they are with mode="bilinear".
# Seen: largest difference of images in [0, 1]: bicubic 0.087, bilinear 2e-6; Pillow agrees with antialias=True to 6e-6.
# Advice: a protocol that names a bicubic resize must say antialias even where it only enlarges.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pillow==13.0.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def enlarged(mode, antialias):
    return F.interpolate(x, size=(224, 224), mode=mode, antialias=antialias)[0, 0].numpy()


pillow = np.asarray(Image.fromarray(x[0, 0].numpy()).resize((224, 224), Image.Resampling.BICUBIC))
bicubic = abs(enlarged("bicubic", True) - enlarged("bicubic", False)).max()
bilinear = abs(enlarged("bilinear", True) - enlarged("bilinear", False)).max()
agreement = abs(enlarged("bicubic", True) - pillow).max()
print(f"bicubic {bicubic:.2g}, bilinear {bilinear:.1g}, Pillow and antialias=True {agreement:.1g}")
assert bicubic > 0.05 and bilinear < 1e-4 and agreement < 1e-4
PY
