#!/usr/bin/env bash
# Versions: torch 2.13.0, pytorch-ignite 0.5.5
# Behaviour: SSIM(gaussian=False, kernel_size=k) of ignite sets five weights of 1/5 in the middle of k places: windows
#   of 7, 9 or 11 are windows of 5 with zeros around. At k = 3 only three of them fit, the weights of the window sum to
#   0.36, and what is taken for the variance holds 0.23 of the squared mean.
# Guess: the mean over a window of k x k, as in scikit-image, where 7 is the default.
# Seen: an image with noise has 0.43, 0.55, 0.63, 0.69, 0.72 for windows of 3, 5, 7, 9, 11; ignite says 0.92 and then
#   0.55 four times. At 3, an image and noise that have nothing in common have 0.67 instead of 0.01.
# Advice: kernel_size=5 alone is as asked for; the Gaussian window, which is the default, is as it should be.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytorch-ignite==0.5.5
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F
from ignite.metrics import SSIM


def reference(x, y, size):
    x, y = (F.pad(image.double(), [size // 2] * 4, mode="reflect") for image in (x, y))
    a, b, aa, bb, ab = (F.avg_pool2d(z, size, 1) for z in (x, y, x * x, y * y, x * y))
    luminance = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    return (luminance * (2 * (ab - a * b) + 0.03**2) / (aa - a * a + bb - b * b + 0.03**2)).mean().item()


def ignite(x, y, size):
    metric = SSIM(data_range=1.0, gaussian=False, kernel_size=size)
    metric.update((x, y))
    return metric.compute()


torch.manual_seed(0)
image = (4 * F.avg_pool2d(torch.rand(4, 3, 128, 128), 9, 1, 4) - 1.5).clamp(0, 1)
cases = {
    "with noise": (image + 0.1 * torch.randn_like(image)).clamp(0, 1),
    "blurred": F.avg_pool2d(image, 7, 1, 3),
    "unrelated": torch.rand_like(image),
}
for name, other in cases.items():
    seen = {size: (ignite(other, image, size), reference(other, image, size)) for size in (3, 5, 7, 9, 11)}
    for size, (value, expected) in seen.items():
        print(f"{name}, window of {size}: ignite {value:.4f}, the mean over the window {expected:.4f}")
    assert abs(seen[5][0] - seen[5][1]) < 1e-4
    assert all(abs(seen[size][0] - seen[5][0]) < 1e-6 for size in (7, 9, 11))
    assert seen[3][0] - seen[3][1] > 0.4
    if name != "unrelated":
        assert seen[11][1] - seen[11][0] > 0.15
PY
