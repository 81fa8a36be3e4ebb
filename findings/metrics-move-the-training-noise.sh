#!/usr/bin/env bash
# Versions: torch 2.13.0, torchmetrics 1.9.0
# Behaviour: `compute` of torchmetrics' KernelInceptionDistance and InceptionScore draws from torch's global generator.
#   A run that measures at validation trains on other noise than one that does not, and the same features give another
#   standard deviation at each call.
# Guess: computing a metric changes nothing outside it.
# Seen: KID and IS move the generator, FID does not; two computes of one InceptionScore differ.
# Advice: put torch.random.fork_rng() around compute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance


class Features(torch.nn.Module):
    num_features = 16

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 16)

    def forward(self, x):
        return self.layer(x.float().flatten(1) / 255)


def moves(metric):
    before = torch.get_rng_state()
    metric.compute()
    return not torch.equal(before, torch.get_rng_state())


torch.manual_seed(0)
features, images = Features(), torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
kid = KernelInceptionDistance(feature=features, subset_size=32, subsets=4)
fid = FrechetInceptionDistance(feature=features)
for metric in (kid, fid):
    metric.update(images, real=True)
    metric.update(images.flip(3), real=False)
score = InceptionScore(feature=features, splits=4)
score.update(images)
seen = {type(m).__name__: moves(m) for m in (kid, score, fid)}
first = score.compute()[1].item()
score._computed = None
second = score.compute()[1].item()
print(seen, "standard deviations of one score", first, second)
assert seen == {"KernelInceptionDistance": True, "InceptionScore": True, "FrechetInceptionDistance": False}
assert first != second
PY
