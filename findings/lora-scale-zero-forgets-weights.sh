#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1, peft 0.21.2
# Behaviour: after a forward pass, diffusers divides the adapters' scaling by the `scale` of cross_attention_kwargs. By
#   0 it cannot divide, and sets the weights of all active adapters to 1 instead. One call at scale 0, for the picture
#   without the adapter, and what set_adapters asked for is gone.
# Guess: the scale is for one call; the weights of set_adapters stay.
# Seen: adapters at weights 0.3 and 0.6: a call at scale 0.5 leaves the output as it was. After one at scale 0 it is
#   that of the weights 1 and 1, exactly.
# Advice: disable_adapters() and enable_adapters() for the picture without, or set_adapters again after scale 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 diffusers==0.42.1 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32), torch.tensor([100, 500])
net = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
for name in ("style", "subject"):
    net.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name=name)
for name, p in net.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.3)


@torch.no_grad()
def output(scale=None):
    kwargs = None if scale is None else {"scale": scale}
    return net(x, t, context, cross_attention_kwargs=kwargs).sample


def gap(a, b):
    return (a - b).abs().max().item()


net.set_adapters(["style", "subject"], [1.0, 1.0])
full = output()
net.set_adapters(["style", "subject"], [0.3, 0.6])
first = output()
net.disable_adapters()
bare = output()
net.enable_adapters()
output(0.5)
half = output()
without = output(0.0)
last = output()
print(f"scale 0 from the base {gap(without, bare):.1g}; after scale 0.5, from before it {gap(half, first):.1g}")
print(f"after scale 0: from before it {gap(last, first):.2f}, from weights of 1 {gap(last, full):.1g}")
assert gap(without, bare) < 1e-5 and gap(half, first) < 1e-5
assert gap(last, first) > 0.05 and gap(last, full) < 1e-6
PY
