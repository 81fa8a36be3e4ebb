#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: AdamW on bfloat16 parameters keeps its second moment in bfloat16. At the default beta2 of 0.999 one step
#   changes it by less than half of its last digit, so that it stands still: under a steady gradient it stops at half or a
#   quarter of its square, and once a gradient has been large it never shrinks again, with and without `fused=True`.
#   At beta2 = 0.99 it moves.
# Guess: bfloat16 costs digits; the second moment follows the gradient as in float32, if roughly.
# Seen: after 5,000 steps of gradient 1, v is 0.5, fused 0.25 (float32: 0.9933): steps are 1.4 and 2 times the learning
#   rate. After 5,000 further steps of gradient 0.1, v is unchanged (float32: 0.0166): they are a seventh and a fifth.
# Advice: with pure bfloat16 training (`bf16-true`) use beta2 of at most 0.99, or keep float32 parameters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch


def second_moments(dtype, fused, beta2=0.999):
    """v after 5,000 steps of gradient 1, and after 5,000 more of gradient 0.1."""
    p = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
    optimizer = torch.optim.AdamW([p], lr=1e-5, betas=(0.9, beta2), weight_decay=0, fused=fused)
    found = []
    for gradient in (1.0, 0.1):
        p.grad = torch.full_like(p, gradient)
        for _ in range(5000):
            optimizer.step()
        found.append(optimizer.state[p]["exp_avg_sq"][0].item())
    return found


full = second_moments(torch.float32, True)
print("float32", full)
assert abs(full[0] - (1 - 0.999**5000)) < 1e-3
for fused in (False, True):
    half = second_moments(torch.bfloat16, fused)
    print("bfloat16, fused" if fused else "bfloat16", half)
    assert half[0] <= 0.5
    assert half[1] == half[0] > 10 * full[1]
moves = second_moments(torch.bfloat16, True, 0.99)
print("bfloat16, beta2 = 0.99", moves)
assert moves[1] < 0.1 * moves[0]
PY
