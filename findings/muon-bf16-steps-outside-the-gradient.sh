#!/usr/bin/env bash
# Versions: torch 2.14.1, torchvision 0.29.1, timm 1.0.31
# Behaviour: timm's Muon orthogonalises in bfloat16. A gradient of low rank, as every layer has that sees one row per
#   sample (conditioning, time embedding, adaptive norms), has rounding noise in all other directions, and the
#   iteration raises small singular values to 1.
# Guess: bfloat16 costs 0.4 % of a step; a gradient of rank 8 gives a step of rank 8.
# Seen: 128 x 128 of rank 8: 39 % of the step (by norm) lies outside the columns that the gradient spans; rank 32: 22 %;
#   full rank: none. In float32 it is 2e-5. Two devices that sum in another order take other steps there: weights of two
#   processes are up to a quarter of their way apart after 4 steps.
# Advice: leave such layers to AdamW, or orthogonalise in float32 where the batch is smaller than the layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.14
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from timm.optim.muon import zeropower_via_newtonschulz

QUINTIC = [(3.4445, -4.7750, 2.0315)]
generator = torch.Generator().manual_seed(0)
outside = {}
for rank in (8, 32, 128):
    gradient = torch.randn(128, rank, generator=generator) @ torch.randn(rank, 128, generator=generator)
    columns = torch.linalg.svd(gradient).U[:, :rank]
    for dtype in (torch.bfloat16, torch.float32):
        step = zeropower_via_newtonschulz(gradient, 5, QUINTIC, dtype=dtype).float()
        outside[rank, dtype] = float((step - columns @ columns.T @ step).norm() / step.norm())
        print(f"rank {rank}, {dtype}: {outside[rank, dtype]:.1e} of the step outside the gradient's columns")
assert outside[8, torch.bfloat16] > 0.3
assert outside[8, torch.float32] < 1e-4
PY
