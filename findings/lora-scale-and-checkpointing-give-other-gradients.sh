#!/usr/bin/env bash
# Versions: torch 2.13.0, diffusers 0.42.1, peft 0.21.2
# Behaviour: the scale of cross_attention_kwargs (joint_attention_kwargs of transformers) scales the adapters only for
#   the length of the forward pass. Gradient checkpointing computes the blocks again in the backward pass, when the
#   scaling is back at 1: the gradient is taken inside another network than the loss was. Shapes agree, so nothing is
#   noticed.
# Guess: gradients do not depend on checkpointing, up to rounding.
# Seen: a small U-Net with adapters: equal losses at each scale. At scale 1 equal gradients, at 0.5 a cosine of 0.90 and
#   a norm 1.3 times too large, at 2 a cosine of 0.34, at -1, as sliders are trained, 0.19. The same weights given by
#   set_adapters: equal gradients.
# Advice: set_adapters(name, scale) before the step instead of the argument, or no checkpointing.
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
x, y, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32), torch.tensor([100, 500])
net = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).train()
net.requires_grad_(False)
net.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
for name, p in net.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.3)


def gradient(checkpointing, scale=None, weight=1.0):
    net.enable_gradient_checkpointing() if checkpointing else net.disable_gradient_checkpointing()
    net.set_adapters("default", weight)
    net.zero_grad()
    loss = (net(x, t, context, cross_attention_kwargs=scale and {"scale": scale}).sample - y).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def compare(**kw):
    (loss, g), (same_loss, other) = gradient(False, **kw), gradient(True, **kw)
    cosine, ratio = torch.cosine_similarity(g, other, dim=0).item(), (other.norm() / g.norm()).item()
    print(kw, f"losses {loss:.4f} {same_loss:.4f}, gradients: cosine {cosine:.3f}, norms' ratio {ratio:.3f}")
    assert abs(loss - same_loss) < 1e-6
    return cosine, ratio


for scale in (None, 1.0):
    assert min(compare(scale=scale)) > 0.9999
for weight in (0.5, 2.0, -1.0):
    assert min(compare(weight=weight)) > 0.9999
assert compare(scale=0.5)[0] < 0.95 and compare(scale=0.5)[1] > 1.2
assert compare(scale=2.0)[0] < 0.7 and compare(scale=-1.0)[0] < 0.5
PY
