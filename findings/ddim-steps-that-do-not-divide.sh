#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1
# Behaviour: DDIMScheduler takes 1000 // steps as the distance to the next level, whatever the levels are. Where the
#   number of steps does not divide 1000, each step of "trailing" and "linspace" ends above the level at which the next
#   call is made, and noise is left over. "leading", the default, has even steps instead and starts late: 300 steps at
#   t = 897, 501 at t = 500, half-way. DDPMScheduler looks up the next level.
# Guess: more steps never hurt, and a step ends where the next begins.
# Seen: Gaussian data of mean 0.5 and deviation 0.5, the exact network, trailing: 250 steps give 0.49 and 0.50,
#   300 steps 0.46 and 0.54, 400 steps 0.42 and 0.58, 501 steps 0.29 and 0.71. DDPM: 0.50 and 0.49 at 300.
# Advice: take a number of steps that divides the number of training steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers import DDIMScheduler, DDPMScheduler

mean = std = 0.5


def sample(kind, steps, spacing):
    """First time step, mean and deviation of the samples of the exact network."""
    scheduler = kind(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    z = torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t].double()
        eps = (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)
        z = scheduler.step(eps, t, z).prev_sample
    return scheduler.timesteps[0].item(), z.mean().item(), z.std().item()


for spacing in ("trailing", "linspace", "leading"):
    seen = {steps: sample(DDIMScheduler, steps, spacing) for steps in (250, 300, 400, 500, 501)}
    for steps, (first, m, s) in seen.items():
        print(f"{spacing}, {steps} steps from t = {first}: mean {m:.2f}, deviation {s:.2f}")
        assert steps not in (250, 500) or (abs(m - mean) < 0.02 and abs(s - std) < 0.01)
    if spacing == "leading":
        assert [seen[steps][0] for steps in seen] == [996, 897, 798, 998, 500] and seen[501][1] < 0.45
    else:
        assert seen[300][2] > 0.53 and seen[400][2] > 0.57 and seen[501][2] > 0.7 and seen[501][1] < 0.3
_, m, s = sample(DDPMScheduler, 300, "trailing")
print(f"DDPM, trailing, 300 steps: mean {m:.2f}, deviation {s:.2f}")
assert abs(m - mean) < 0.02 and abs(s - std) < 0.02
PY
