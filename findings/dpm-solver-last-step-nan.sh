#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1
# Behaviour: with Karras levels and final_sigmas_type="sigma_min" DPMSolverMultistepScheduler appends the smallest level
#   to a list that ends with it. The last step has length 0: a call is wasted, and from 15 steps on order 3, and order 2
#   with solver_type="heun", divide 0 by 0 and return NaN. With 10 steps, and without Karras levels, all is finite.
# Guess: the image keeps noise of 1 % and is finite at any number of steps.
# Seen: last levels 0.0277, 0.0100, 0.0100; finite at 10 steps, NaN at 20 steps for (3, midpoint), (3, heun), (2, heun).
# Advice: end at zero, which is the default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers import DPMSolverMultistepScheduler


def finite(steps, order, kind, karras):
    scheduler = DPMSolverMultistepScheduler(
        final_sigmas_type="sigma_min", solver_order=order, solver_type=kind, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(steps)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[int(t)]
        eps = z * (1 - a).sqrt() / (0.25 * a + 1 - a)  # exact for data of standard deviation 0.5
        z = scheduler.step(eps, t, z, return_dict=False)[0]
    return z.isfinite().all().item(), scheduler.sigmas[-3:].tolist()


for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")):
    ten, twenty, plain = finite(10, order, kind, True), finite(20, order, kind, True), finite(20, order, kind, False)
    print(f"order {order} {kind}: finite at 10 steps {ten[0]}, at 20 {twenty[0]}, 20 without Karras levels {plain[0]}")
    assert ten[0] and plain[0] and twenty[0] == (order == 1 or (order, kind) == (2, "midpoint"))
    assert twenty[1][-1] == twenty[1][-2]
print("last levels", twenty[1])
PY
