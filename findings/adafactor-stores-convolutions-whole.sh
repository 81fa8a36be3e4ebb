#!/usr/bin/env bash
# Versions: torch 2.13.0, transformers 5.24.0, diffusers 0.42.1, came-pytorch 0.1.3
# Behaviour: Adafactor and CAME keep a row and a column instead of a second moment, of the last two dimensions only.
#   Those of a convolution are its kernel: of 3 x 3 two thirds remain, and of 1 x 1 the row and the column are each as
#   large as the weight, so that Adafactor stores as much as AdamW with both of its moments. CAME does so twice, beside
#   its first moment.
# Guess: state that vanishes beside the weights, as for linear layers, or at least less than AdamW's two per weight.
# Seen: state per weight, linear layer: Adafactor 0.002, CAME 1.005; convolution 3 x 3: 0.67 and 2.33; 1 x 1: 2 and 5.
#   A U-Net with the blocks of Stable Diffusion 1.5 at a quarter of its width: Adafactor 0.54, CAME 2.07, AdamW 2.
# Advice: count the state, sum(t.numel() for s in optimizer.state.values() for t in s.values()), before choosing it for
#   a convolutional network; timm's AdafactorBigVision picks the two largest dimensions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 diffusers==0.42.1 came-pytorch==0.1.3
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from came_pytorch import CAME
from diffusers import UNet2DConditionModel
from transformers.optimization import Adafactor

optimizers = {
    "torch": torch.optim.Adafactor,
    "transformers": Adafactor,
    "CAME": lambda parameters: CAME(parameters, lr=1e-4),
    "AdamW": torch.optim.AdamW,
}


def state(optimizer, parameters):
    """Numbers of state per number of weight after one step."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = optimizers[optimizer](parameters)
    optimizer.step()
    kept = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    return sum(t.numel() for t in kept) / sum(p.numel() for p in parameters)


seen = {}
for shape in ((1280, 640), (1280, 640, 3, 3), (1280, 640, 1, 1)):
    seen[shape[2:]] = {name: state(name, [torch.nn.Parameter(torch.randn(shape))]) for name in optimizers}
    print(shape, {name: round(per_weight, 3) for name, per_weight in seen[shape[2:]].items()})
net = UNet2DConditionModel(block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=16)
unet = {name: state(name, net.parameters()) for name in optimizers}
print("U-Net", {name: round(per_weight, 3) for name, per_weight in unet.items()})
assert all(moments["AdamW"] == 2 for moments in seen.values())
assert seen[()]["torch"] < 0.01 and seen[()]["CAME"] < 1.01
for name in ("torch", "transformers"):
    assert 0.66 < seen[3, 3][name] < 0.67 and seen[1, 1][name] == 2
assert seen[3, 3]["CAME"] > 2.3 and seen[1, 1]["CAME"] == 5
assert unet["torch"] > 0.4 and unet["CAME"] > 2
PY
