#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: `manual_seed` takes 64 bits, but the CPU generator starts from the lower 32. Seeds that differ by 2**32
#   give the same noise; of 100,000 seeds drawn from 64 bits, such as hashes of names, one pair is expected to coincide,
#   of a million 116.
# Guess: different 64-bit seeds give different noise.
# Seen: seeds 7 and 7 + 2**32 draw equal noise; 200,000 hashes of 63 bits hold 8 pairs that draw equal noise (4.7
#   expected).
# Advice: draw from a counter-based generator, or keep seeds below 2**32 and distinct.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import hashlib

import torch


def noise(seed):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed))


def hashed(n):
    return int.from_bytes(hashlib.blake2b(str(n).encode(), digest_size=8).digest(), "big") >> 1


first = {}
pairs = []
for n in range(200_000):
    twin = first.setdefault(hashed(n) % 2**32, n)
    if twin != n:
        pairs.append((twin, n))
print("7 and 7 + 2**32 draw the same:", torch.equal(noise(7), noise(7 + 2**32)), "; twins among 200,000 hashes:", pairs)
assert torch.equal(noise(7), noise(7 + 2**32)) and pairs
assert all(hashed(a) != hashed(b) and torch.equal(noise(hashed(a)), noise(hashed(b))) for a, b in pairs)
PY
