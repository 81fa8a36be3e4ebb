#!/usr/bin/env bash
# Versions: torchmetrics 1.9.0, torchvision 0.29.1, torch 2.14.1
# Behaviour: torchmetrics' `normalize=True` (FID, KID, Inception Score) and torchvision's `to_pil_image` make bytes of
#   floats by cutting off what follows the point. A byte divided by 255 comes back as itself; a byte that was brought to
#   [-1, 1] for a diffusion model and back to [0, 1] lies a rounding error lower at a quarter of all levels, and comes
#   back one level darker. `save_image` and `to_dtype(scale=True)` return the byte.
# Guess: 8-bit images survive [-1, 1] in float32: all values are there, and the error is 1e-7.
# Seen: 63 of 256 levels are one lower in what the metric's network gets, and in PIL images; none in `save_image`.
# Advice: round before you hand images over: `(x * 127.5 + 127.5).round().clamp(0, 255).byte()`, without `normalize`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torchmetrics-1.9-torchvision-0.29
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchmetrics==1.9.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from PIL import Image
from torchmetrics.image.inception import InceptionScore
from torchvision.transforms.v2 import functional as F
from torchvision.utils import save_image

levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
there = levels.float() / 127.5 - 1  # as a diffusion model is trained
back = ((there + 1) / 2).clamp(0, 1)


class Seen(torch.nn.Module):
    """In place of Inception: keeps the bytes that it is given."""

    def forward(self, images):
        self.images = images
        return torch.zeros(len(images), 4)


def through_score(images):
    network = Seen()
    InceptionScore(feature=network, normalize=True).update(images)
    return network.images


def through_file(images):
    save_image(images, "levels.png")
    return torch.from_numpy(np.array(Image.open("levels.png"))).permute(2, 0, 1)[None]


ways = {
    "normalize=True": through_score,
    "to_pil_image": lambda x: torch.from_numpy(np.array(F.to_pil_image(x[0]))).permute(2, 0, 1)[None],
    "to_dtype": lambda x: F.to_dtype(x, torch.uint8, scale=True),
    "save_image": through_file,
}
lower = {}
for name, way in ways.items():
    direct = (way(levels.float() / 255).int() - levels.int())[0, 0]
    change = (way(back).int() - levels.int())[0, 0]
    lower[name] = int((change == -1).sum())
    print(f"{name}: {lower[name]} levels one lower, others {int(((change != 0) & (change != -1)).sum())}")
    assert int((direct != 0).sum()) == 0, name
assert lower["normalize=True"] == lower["to_pil_image"] == 63
assert lower["to_dtype"] == lower["save_image"] == 0
PY
