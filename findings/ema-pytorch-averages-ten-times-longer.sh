#!/usr/bin/env bash
# Versions: torch 2.13.0, ema-pytorch 0.8.3
# Behaviour: `EMA(beta=0.99)` with its other defaults counts a step per call but averages on every tenth only, with the
#   same beta: the average follows ten times more slowly than beta says, 0.9999 means 100,000 steps.
# Guess: update_every saves time and beta keeps its meaning per step.
# Seen: after 100, 500, 1000 calls the average has gone 10, 39, 63 % of the way; at one average per call it would be 63,
#   99, 100 %.
# Advice: set update_every=1, or take the tenth power of beta.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from ema_pytorch import EMA

network = torch.nn.Linear(1, 1, bias=False)
network.weight.data.zero_()
ema = EMA(network, beta=0.99)
for _ in range(3000):
    ema.update()
network.weight.data.fill_(1.0)
seen = {}
for n in range(1, 1001):
    ema.update()
    seen[n] = ema.ema_model.weight.item()
for n in (100, 500, 1000):
    print(f"after {n} calls {seen[n]:.3f}, beta per call would give {1 - 0.99**n:.3f}")
assert abs(seen[1000] - (1 - 0.99**100)) < 0.01
PY
