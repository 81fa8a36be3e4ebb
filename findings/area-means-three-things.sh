#!/usr/bin/env bash
# Versions: torch 2.13.0, Pillow 13.0.0, opencv-python-headless 5.0.0.93
# Behaviour: torch's mode="area", Pillow's BOX and OpenCV's INTER_AREA agree for whole ratios only. At 100 to 64 pixels
#   OpenCV weighs each source pixel by the part that is covered, Pillow takes a pixel whole or not at all, torch
#   averages overlapping bins, and a smooth ramp comes out shifted by up to a fifth of a pixel.
# Guess: "area" is the mean over the covered area in all three, equal up to rounding.
# Seen: largest error against the exact mean over the area, uniform noise in [0, 1], 128 to 64: all below 1e-6; 100 to
#   64: OpenCV 1e-7, Pillow 0.5, torch 0.3.
# Advice: name the function, not the word, in a data recipe.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def exact(x, size):
    """The mean over the covered area, each axis by a matrix of overlaps."""
    n, edges = len(x), np.arange(size + 1) * len(x) / size
    low, high = np.arange(n), np.arange(n) + 1
    overlap = np.clip(np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low), 0, None)
    overlap /= overlap.sum(1, keepdims=True)
    return overlap @ x @ overlap.T


seen = {}
for source in (128, 100):
    x = np.random.default_rng(0).random((source, source)).astype(np.float32)
    results = {
        "OpenCV": cv2.resize(x, (64, 64), interpolation=cv2.INTER_AREA),
        "Pillow": np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BOX)),
        "torch": F.interpolate(torch.from_numpy(x)[None, None], size=(64, 64), mode="area")[0, 0].numpy(),
    }
    for name, got in results.items():
        seen[name, source] = abs(got - exact(x.astype(float), 64)).max()
        print(source, name, f"{seen[name, source]:.1g}")
ramp = F.interpolate(torch.arange(100.0)[None, None, None], size=(1, 64), mode="area").flatten()
shift = (ramp - ((torch.arange(64) + 0.5) * 100 / 64 - 0.5)).abs().max().item()
print(f"torch shifts a ramp by up to {shift:.2f} pixels")
assert max(seen[name, 128] for name in results) < 1e-5 and seen["OpenCV", 100] < 1e-5
assert seen["Pillow", 100] > 0.2 and seen["torch", 100] > 0.2 and shift > 0.2
PY
