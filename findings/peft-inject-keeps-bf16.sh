#!/usr/bin/env bash
# Versions: torch 2.13.0, peft 0.21.2
# Behaviour: in a bfloat16 network `get_peft_model` makes float32 adapters, `inject_adapter_in_model`, which models that
#   are not from transformers use, makes bfloat16 ones. There most Adam steps of a usual learning rate are below half a
#   unit in the last place and change nothing.
# Guess: both ways give adapters of the same dtype.
# Seen: get_peft_model torch.float32, inject_adapter_in_model torch.bfloat16; 100 AdamW steps of lr 1e-5 move all
#   weights of lora_A in the first, 6 % in the second.
# Advice: cast the injected adapters to float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

torch.manual_seed(0)
base = torch.nn.ModuleDict({"qkv": torch.nn.Linear(256, 768)}).bfloat16()
config = LoraConfig(r=8, target_modules=["qkv"])
seen = {}
for name, make in (
    ("get_peft_model", lambda n: get_peft_model(n, config).base_model.model),
    ("inject_adapter_in_model", lambda n: inject_adapter_in_model(config, n)),
):
    weight = make(copy.deepcopy(base))["qkv"].lora_A["default"].weight
    before, optimizer = weight.detach().clone(), torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    seen[name] = weight.dtype, (weight != before).double().mean().item()
    print(name, weight.dtype, f"{seen[name][1]:.0%} of the weights moved in 100 steps")
assert seen["get_peft_model"] == (torch.float32, 1.0)
assert seen["inject_adapter_in_model"][0] == torch.bfloat16 and seen["inject_adapter_in_model"][1] < 0.5
PY
