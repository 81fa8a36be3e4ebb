#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1
# Behaviour: `FlowMatchEulerDiscreteScheduler(shift=3)` shifts its noise levels at construction and again in
#   set_timesteps, and spaces N calls down to the smallest level. Of four calls the last is made at noise 0.9 %, where
#   nothing is left to do: with an exact model four calls give what three evenly spread ones give.
# Guess: four calls are spread over the whole path, as pipelines that pass their own levels do; asking for all 1000
#   steps changes nothing.
# Seen: levels after set_timesteps(4): 1, 0.858, 0.602, 0.009; smallest of 1000 steps 0.0030 at construction, 0.0089
#   afterwards; standard deviation with an exact model of N(0, 0.5^2): 0.161 from four calls, 0.154 from three at levels
#   1, 2/3, 1/3, and 0.213 from four at 1, 3/4, 1/2, 1/4.
# Advice: pass sigmas whenever the number of steps is small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def spread(**levels):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(**levels)
    z = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    for t, s in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        velocity = z * (s - 0.25 * (1 - s)) / (0.25 * (1 - s) ** 2 + s**2)  # exact for data of standard deviation 0.5
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
    return [round(s, 3) for s in scheduler.sigmas.tolist()], round(z.std().item(), 3)


scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
before = scheduler.sigmas[-1].item()
scheduler.set_timesteps(1000)
after = scheduler.sigmas[-2].item()
plain, own = spread(num_inference_steps=4), spread(num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25])
three = spread(num_inference_steps=3, sigmas=[1.0, 2 / 3, 1 / 3])
print(f"smallest level {before:.4f} at construction, {after:.4f} after set_timesteps(1000)")
print("four steps", *plain)
print("four steps from levels given", *own)
print("three steps from levels given", *three)
assert after > 2.9 * before and plain[0][3] < 0.01 and own[0][3] == 0.5
assert abs(plain[1] - three[1]) < 0.01 < own[1] - plain[1]
PY
