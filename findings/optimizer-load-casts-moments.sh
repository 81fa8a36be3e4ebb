#!/usr/bin/env bash
# Versions: torch 2.13.0
# Behaviour: `Optimizer.load_state_dict` casts every floating-point state except `step` to the dtype of the parameter.
#   An optimizer that keeps float32 moments or float32 master weights for bfloat16 parameters is right until its first
#   resume, and then wrong without a word.
# Guess: a state dict comes back as it was saved.
# Seen: before: torch.float32 1.001; after: torch.bfloat16 1.0.
# Advice: override load_state_dict of such an optimizer, or put the float32 tensors back by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch


class Master(torch.optim.Optimizer):
    """Gradient descent that keeps float32 master weights."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.detach().float())
            master -= 0.001 * p.grad.float()
            p.data.copy_(master)


parameter = torch.nn.Parameter(torch.full((1,), 1.002, dtype=torch.bfloat16))
parameter.grad = -torch.ones_like(parameter)
before, after = Master([parameter]), Master([parameter])
before.step()
after.load_state_dict(before.state_dict())
for optimizer in (before, after):
    master = optimizer.state[parameter]["master"]
    print(master.dtype, master.item())
assert before.state[parameter]["master"].dtype == torch.float32
assert after.state[parameter]["master"].dtype == torch.bfloat16
assert before.state[parameter]["master"].item() != after.state[parameter]["master"].item()
PY
