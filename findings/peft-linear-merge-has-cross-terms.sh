#!/usr/bin/env bash
# Versions: torch 2.13.0, peft 0.21.2
# Behaviour: add_weighted_adapter with combination_type="linear" adds up the factors, each times the root of its weight,
#   and multiplies the sums. The product holds A of one adapter times B of the other as well. For unrelated adapters
#   these terms are as large as the mixture, for related ones they double it. "dare_linear", "magnitude_prune" and
#   "ties" work on the factors too. "cat" stacks the factors and is exact.
# Guess: linear in the updates: the weighted sum of the two, as two adapters that are active at once add up.
# Seen: half and half of two unrelated adapters: 100 % off the mean of the updates, "cat" 1e-7. One minus the other: the
#   same. The mean of two checkpoints of one training that differ by 1 % is twice the adapter, with "ties" half of it.
# Advice: combination_type="cat", or "svd" with svd_rank as large as all ranks together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(r=8, target_modules=["0"])
net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(256, 256)), config, adapter_name="cat")
for name in ("dog", "later"):
    net.add_adapter(name, config)
layer = net.base_model.model[0]
for factor in (layer.lora_A, layer.lora_B):
    for name in ("cat", "dog"):
        torch.nn.init.normal_(factor[name].weight, std=0.1)
    weight = factor["cat"].weight.data
    factor["later"].weight.data = weight + 0.01 * weight.std() * torch.randn_like(weight)


def merged(names, weights, how, **kw):
    """Error of the merged update beside the weighted sum, and its size along that sum."""
    wanted = sum(weight * layer.get_delta_weight(name) for name, weight in zip(names, weights))
    net.add_weighted_adapter(list(names), list(weights), "merged", combination_type=how, **kw)
    got = layer.get_delta_weight("merged")
    net.delete_adapter("merged")
    error = ((got - wanted).norm() / wanted.norm()).item()
    return error, ((got * wanted).sum() / wanted.square().sum()).item()


kinds = {
    "linear": {},
    "dare_linear": {"density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "ties": {"density": 1.0},
    "cat": {},
    "svd": {"svd_rank": 16},
}
for how, kw in kinds.items():
    other = merged(("cat", "dog"), (0.5, 0.5), how, **kw)
    later = merged(("cat", "later"), (0.5, 0.5), how, **kw)
    minus = merged(("cat", "dog"), (1.0, -1.0), how, **kw)
    print(f"{how}: cat and dog {other[0]:.1g} off, cat minus dog {minus[0]:.1g}, cat and later {later[1]:.3f} of it")
    if how in ("cat", "svd"):
        assert max(other[0], minus[0]) < 1e-4 and abs(later[1] - 1) < 1e-4
    else:
        assert min(other[0], minus[0]) > 0.7
    assert how != "linear" or abs(later[1] - 2) < 0.02
PY
