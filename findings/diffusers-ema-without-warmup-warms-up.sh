#!/usr/bin/env bash
# Versions: diffusers 0.42.1 (with torch 2.13.0)
# Behaviour: `EMAModel(decay=0.9999)` with `use_ema_warmup=False`, the default, still raises its decay step by step, as
#   min(decay, (1 + n) / (10 + n)); 0.9999 is first used at step 89,990. `use_ema_warmup=True` chooses another, slower
#   rule, 1 - (1 + n)^(-2/3) at its defaults, which needs a million steps. Neither is the constant decay.
# Guess: without warm-up every step uses the decay that was asked for.
# Seen: decays at steps 100, 1,000 and 10,000: 0.9174, 0.9911, 0.9991 (with warm-up 0.9536, 0.9900, 0.9978).
# Advice: `min_decay` equal to `decay` gives the constant; state the rule where two EMAs are compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/diffusers-0.42
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers.training_utils import EMAModel

STEPS = (100, 1_000, 10_000, 89_980, 90_000, 1_000_000)


def decays(**options):
    ema = EMAModel(torch.nn.Linear(2, 2).parameters(), decay=0.9999, **options)
    return [ema.get_decay(step) for step in STEPS]


plain, warm, constant = decays(), decays(use_ema_warmup=True), decays(min_decay=0.9999)
for name, values in (("default", plain), ("use_ema_warmup", warm), ("min_decay", constant)):
    print(name, [round(value, 6) for value in values])
for found, step in zip(plain, STEPS):
    assert abs(found - min(0.9999, step / (9 + step))) < 1e-9
assert plain[3] < 0.9999 == plain[4]
assert warm[2] < 0.998 and warm[4] < 0.9996
assert set(constant) == {0.9999}
PY
