#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1
# Behaviour: `DiTTransformer2DModel` spaces the 128 frequencies of its time features over 127 steps (10000^(-i/127)). The
#   authors' code, whose weights `DiTPipeline` is published with, spaces them over 128 (10000^(-i/128)).
# Guess: converted weights get the time features that they were trained with.
# Seen: at time 900 the features differ from the authors' by up to 1.85 of at most 2, and by 4e-5 from those over 127 steps.
# Advice: compare a DiT of diffusers with one of the authors' code by its output at one time, not by its weights alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import math

import torch
from diffusers import DiTTransformer2DModel

network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8,
                                patch_size=2, num_embeds_ada_norm=10).eval()
seen = {}
projection = next(m for name, m in network.named_modules() if name.endswith("time_proj"))
projection.register_forward_hook(lambda module, inputs, output: seen.update(features=output.detach()))
with torch.no_grad():
    network(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([900]), class_labels=torch.tensor([0]))
cosines = seen["features"][0, :128].double()


def published(divisor):
    angles = 900 * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / divisor)
    return angles.cos()


authors, other = ((cosines - published(steps)).abs().max().item() for steps in (128, 127))
print(f"largest difference from frequencies over 128 steps {authors:.2f}, over 127 steps {other:.0e}")
assert authors > 1 and other < 1e-3
PY
