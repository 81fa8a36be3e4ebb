#!/usr/bin/env bash
# Versions: torch 2.14.1, torchvision 0.29.1, piq 0.8.0
# Behaviour: piq's FID takes the matrix square root by at most 100 Newton-Schulz steps and stops at an error of 1e-5 of
#   the matrix's norm. Directions of little variance, of which features have many, have not converged by then: the
#   trace that is subtracted is too small, and sets come out farther apart than they are, in float64 too.
# Guess: the distance of a set from itself is 0 up to rounding, and piq agrees with the eigenvalues to a per mille.
# Seen: 10,000 features of 256 dimensions with variances 1 / k^2: 0.063 from themselves, 0.084 instead of 0.015 from
#   others of 1.1 times the scale; with equal variances 2e-6 and 6.3, as it should be.
# Advice: compute FID by eigenvalues, and give a metric a set twice before trusting it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.14
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 piq==0.8.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from piq import FID

torch.manual_seed(0)


def exact(x, y):
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return np.square(x.mean(0).numpy() - y.mean(0).numpy()).sum() + np.trace(a) + np.trace(b) - 2 * roots


seen = {}
for power in (0, 1):
    x, y = torch.randn(2, 10_000, 256, dtype=torch.float64) / torch.arange(1, 257) ** power
    for name, other in (("itself", x), ("another", 1.1 * y)):
        seen[power, name] = FID()(x, other).item(), exact(x, other)
        piq, eigenvalues = seen[power, name]
        print(f"deviations 1 / k^{power}, distance from {name}: piq {piq:.2g}, eigenvalues {eigenvalues:.2g}")
assert all(abs(value) < 1e-6 for key, (_, value) in seen.items() if key[1] == "itself")
assert seen[0, "itself"][0] < 1e-4 and seen[1, "itself"][0] > 0.03
assert seen[1, "another"][0] > 1.5 * seen[1, "another"][1]
PY
