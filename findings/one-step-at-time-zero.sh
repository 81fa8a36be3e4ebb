#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1
# Behaviour: asked for one step, half of diffusers' schedulers place it at t = 0, where the network is told that there
#   is no noise: DDIM and DDPM give back the noise they were started from, Euler, Euler ancestral, Heun and LMS also
#   start from noise of 1 % and give a constant. DPM-Solver, UniPC, DEIS, LCM and TCD place it at 999. Of two steps the
#   first group's second is at t = 0 as well.
# Guess: one step goes from the noisiest level to the image with every scheduler.
# Seen: time of the only step 0 or 999 as said; standard deviation with an exact model of N(0, 0.5^2), where one step
#   can give no more than the mean (0.002 from DPM-Solver): DDIM and DDPM 1.00, Euler, Euler ancestral and LMS 0.010 of
#   the 0.010 they start from, Heun 0.029.
# Advice: ask for timestep_spacing="trailing" with few steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import diffusers
import torch

NAMES = (
    *("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"),
    *("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "LCM", "TCD"),
)
seen = {}
for name in NAMES:
    options = {"clip_sample": False} if name in ("DDIM", "DDPM") else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(1)
    torch.manual_seed(0)
    z = torch.randn(1, 4, 64, 64) * scheduler.init_noise_sigma
    (t,) = scheduler.timesteps
    read, a = scheduler.scale_model_input(z, t), scheduler.alphas_cumprod[int(t)]
    eps = read * (1 - a).sqrt() / (0.25 * a + 1 - a)  # exact for data of standard deviation 0.5
    image = scheduler.step(eps, t, z, return_dict=False)[0]
    seen[name] = int(t), image.std().item()
    print(f"{name}: t = {seen[name][0]}, standard deviation {seen[name][1]:.3f}")
at_zero = {name for name, (t, _) in seen.items() if t == 0}
assert at_zero == {"DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"}
assert {t for name, (t, _) in seen.items() if name not in at_zero} == {999}
PY
