#!/usr/bin/env bash
# Versions: torch 2.13.0, torchmetrics 1.9.0
# Behaviour: memorization-informed FID (Bai et al., 2021, 2106.03062) divides FID by the mean distance from a generated
#   image to its nearest training image. torchmetrics takes the mean over training images of the distance to the
#   nearest generated one. That falls below the threshold of 0.1 only where most of the training set is reproduced. And
#   where FID is below 1e-8, as for the training set itself, the result is 0, the best there is.
# Guess: a generator that outputs training images is punished, at any size of the training set.
# Seen: 5,000 training features; 2,000 copies of 100 of them, or of 2,000: no penalty, MiFID equals FID. The mean
#   distance to the nearest training image is 5e-5, to the nearest generated one 0.65 and 0.34. With real and fake
#   exchanged in `update`, a factor of 2e4.
# Advice: hand over generated images as real=True and the training set as real=False; FID is symmetric.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance


class Features(torch.nn.Module):
    num_features = 64

    def forward(self, images):
        return images.flatten(1).float()


def mifid(first, second, threshold=0.1):
    """At a threshold of almost 0 nothing is punished, and it is plain FID."""
    metric = MemorizationInformedFrechetInceptionDistance(feature=Features(), cosine_distance_eps=threshold)
    metric.update(first, real=True)
    metric.update(second, real=False)
    return metric.compute().item()


def nearest(images, others):
    images, others = (torch.nn.functional.normalize(x.flatten(1)) for x in (images, others))
    return (1 - (images @ others.T).abs()).min(dim=1).values.mean().item()


torch.manual_seed(0)
training, fresh = torch.randn(5000, 1, 8, 8), torch.randn(2000, 1, 8, 8)
copies = training[:2000] + 0.01 * torch.randn(2000, 1, 8, 8)
sets = {"fresh": fresh, "copies of 2000": copies, "copies of 100": copies[:100].repeat(20, 1, 1, 1)}
for name, generated in sets.items():
    plain, punished, exchanged = (
        mifid(training, generated, threshold=1e-30),
        mifid(training, generated),
        mifid(generated, training),
    )
    to_training, to_generated = nearest(generated, training), nearest(training, generated)
    print(f"{name}: FID {plain:.3g}, MiFID {punished:.3g}, exchanged {exchanged:.3g}")
    print(f"  distances: to training {to_training:.2g}, to generated {to_generated:.2g}")
    assert abs(punished / plain - 1) < 1e-6
    if name == "fresh":
        assert abs(exchanged / plain - 1) < 1e-3
    else:
        assert to_training < 1e-3 and to_generated > 0.3 and exchanged / plain > 1e3
print("MiFID of the training set from itself:", mifid(training, training))
assert mifid(training, training) == 0
PY
