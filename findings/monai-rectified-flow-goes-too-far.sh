#!/usr/bin/env bash
# Versions: torch 2.13.0, monai 1.6.1
# Behaviour: RFlowScheduler of MONAI cuts the next time step to an integer, also with use_discrete_timesteps=False. Each
#   step is too long by the fraction that was cut, and the whole path longer than from noise to data: the more steps,
#   the farther. And `transform_scale`, documented as the scale of the time steps' transformation, is not read.
# Guess: the steps add up to the path, at any number of steps.
# Seen: with the exact straight path, 30 steps cover 1.01 of it, 300 steps 1.10, 700 steps 1.25; with discrete steps 1.
#   The time steps of transform_scale 1 and 3 are equal.
# Advice: use_discrete_timesteps=True, or numbers of steps that divide 1000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 monai==1.6.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import RFlowScheduler

torch.manual_seed(0)
noise, data = torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16)


class Straight(torch.nn.Module):
    def forward(self, x, timesteps, context=None):
        return data - noise


def path(steps, discrete):
    scheduler = RFlowScheduler(use_discrete_timesteps=discrete)
    scheduler.set_timesteps(steps)
    got = DiffusionInferer(scheduler).sample(noise, Straight(), scheduler, verbose=False)
    return ((got - noise) / (data - noise)).median().item()


seen = {steps: (path(steps, True), path(steps, False)) for steps in (30, 50, 300, 700)}
for steps, (discrete, continuous) in seen.items():
    print(f"{steps} steps: path {discrete:.3f} discrete, {continuous:.3f} continuous")
    assert abs(discrete - 1) < 1e-3
assert abs(seen[50][1] - 1) < 1e-3
assert seen[30][1] > 1.005 and seen[300][1] > 1.09 and seen[700][1] > 1.2


def times(scale):
    scheduler = RFlowScheduler(
        use_timestep_transform=True, transform_scale=scale, base_img_size_numel=256, spatial_dim=2
    )
    scheduler.set_timesteps(10, input_img_size_numel=1024)
    return scheduler.timesteps.tolist()


print("transform_scale 1", times(1.0), "3", times(3.0))
assert times(1.0) == times(3.0)
PY
