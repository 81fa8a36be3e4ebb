#!/usr/bin/env bash
# Versions: torch 2.13.0, ema-pytorch 0.8.3
# Behaviour: `KarrasEMA` and `PostHocEMA` take their decay from the number of calls but average on every 100th only, so
#   the share of the present weights is 100 times too small and the profile lies at the beginning of the run.
# Guess: update_every saves time; sigma_rel=0.05 averages the last tenth of the run, as in EDM2, only more coarsely.
# Seen: centre and deviation of the profile, in units of the run, for sigma_rel 0.05: 0.95 and 0.05 at update_every=1,
#   0.64 and 0.25 at 10, 0.15 and 0.24 at 100, which is the default.
# Advice: set update_every=1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from ema_pytorch.post_hoc_ema import KarrasEMA

steps, seen = 2000, {}
for every in (1, 10, 100):
    network = torch.nn.Linear(2, 1, bias=False).double()
    average = KarrasEMA(network, sigma_rel=0.05, update_every=every)
    for t in range(1, steps + 1):  # the weights are the time and its square: their average holds the moments
        network.weight.data[0, 0], network.weight.data[0, 1] = t / steps, (t / steps) ** 2
        average.update()
    first, second = average.ema_model.weight.data[0].tolist()
    seen[every] = first, (second - first**2) ** 0.5
    print(f"update_every {every}: centre {seen[every][0]:.3f}, deviation {seen[every][1]:.3f}")
assert abs(seen[1][0] - 0.95) < 0.01 and abs(seen[1][1] - 0.05) < 0.001
assert seen[100][0] < 0.2
PY
