#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: autocast keeps the 16-bit copies of the weights until its outermost region ends, and does not look whether
#   the weights have changed since. Averaged weights that are copied into the network inside the region are not used:
#   the network answers as before, to the bit. Copies of frozen weights (requires_grad=False) are not kept.
# Guess: the copies are renewed when a weight changes in place, as autograd notices such changes by their version.
# Seen: outputs before and after the copy are equal; in a new region, or with cache_enabled=False, they differ by 0.5.
# Advice: open a region of its own for each set of weights; wrap the model call, not the loop over evaluations.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import contextlib
import copy

import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3))
average = copy.deepcopy(net)
with torch.no_grad():
    for p in average.parameters():
        p.mul_(0.5)
x = torch.randn(2, 3, 16, 16)


@torch.no_grad()
def raw_and_averaged(outer=False, trainable=True, cache=True):
    model = copy.deepcopy(net).requires_grad_(trainable)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache) if outer else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            raw = model(x)
        for p, mean in zip(model.parameters(), average.parameters()):
            p.copy_(mean)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return (raw - model(x)).abs().max().item()


apart = raw_and_averaged()
together = raw_and_averaged(outer=True)
print(f"the swap changes the output by {apart:.2f} in regions of their own, {together} in one region")
assert apart > 0.1 and together == 0
assert raw_and_averaged(outer=True, cache=False) == raw_and_averaged(outer=True, trainable=False) == apart
PY
