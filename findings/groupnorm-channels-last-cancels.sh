#!/usr/bin/env bash
# Versions: torch 2.13.0, CPU
# Behaviour: for channels-last maps `group_norm` takes the variance as mean of squares minus square of the mean, so it
#   cancels when a channel's mean is large beside its spread. A mean 10 times the spread costs two more decimal digits
#   than the contiguous kernel loses, 100 times leaves an error of 0.02, and 1000 times one of more than 10, where the
#   values are about 1.
# Guess: the memory layout changes speed, and the result by rounding.
# Seen: largest error against float64 at mean 10, 100, 1000 and spread 1: contiguous 1e-6, 7e-6, 1e-4; channels last
#   2e-4, 2e-2, 13.
# Advice: look at mean over spread before the norms when a channels-last run on a CPU differs from a contiguous one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F

seen = {}
for mean in (10, 100, 1000):
    x = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(0)) + mean
    exact = F.group_norm(x.double(), 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        seen[mean, layout] = (F.group_norm(x.contiguous(memory_format=layout), 8) - exact).abs().max().item()
        print(mean, layout, f"{seen[mean, layout]:.1e}")
for mean in (10, 100, 1000):
    assert seen[mean, torch.contiguous_format] < 1e-3
    assert seen[mean, torch.channels_last] > 20 * seen[mean, torch.contiguous_format]
assert seen[100, torch.channels_last] > 1e-3 and seen[1000, torch.channels_last] > 1
PY
