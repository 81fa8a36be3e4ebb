#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1, torchsde 0.2.6
# Behaviour: the stochastic schedulers of diffusers take their noise from the `generator` of `step`, but for
#   DPMSolverSDEScheduler: its `step` has no such argument, and its Brownian tree takes its seed from torch's global
#   generator. Pipelines pass a generator on only where it is accepted, so one generator gives other images each time.
# Guess: a pipeline called twice with generators of one seed gives one image, whichever the scheduler.
# Seen: of six stochastic schedulers, five give one image from one seed of the generator whatever the global seed;
#   DPMSolverSDEScheduler gives two.
# Advice: give the scheduler a `noise_sampler_seed` with each image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/diffusers-sde
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 torchsde==0.2.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import inspect

import diffusers
import torch

NAMES = (
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
)


def sample(name, global_seed, seed):
    """One sample of a network that predicts 0.3 of its input, as a pipeline runs the loop."""
    torch.manual_seed(global_seed)
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        prediction = 0.3 * scheduler.scale_model_input(x, t)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
    return x


repeated = {name: torch.equal(sample(name, 0, 5), sample(name, 1, 5)) for name in NAMES}
print("same image from one seed of the generator:", repeated)
assert repeated == {name: name != "DPMSolverSDEScheduler" for name in NAMES}
PY
