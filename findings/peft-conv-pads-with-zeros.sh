#!/usr/bin/env bash
# Versions: torch 2.13.0, peft 0.21.2
# Behaviour: LoRA of a convolution takes its kernel size, stride and padding from the layer, not its padding_mode and
#   not its dilation. The adapter pads with zeros beside a layer that pads with a wrapped or mirrored image, and with
#   dilation and padding="same" it reads other pixels. Merging puts the update into the layer's own kernel, which wraps,
#   mirrors and dilates: another network than the trained one.
# Guess: merging changes rounding only, as with zero padding.
# Seen: output deviates by up to 1.3 where its own deviation is 0.75, at the border; with dilation 2 everywhere, by 2.6.
#   The same with DoRA. For networks that are made to tile, the seam returns.
# Advice: leave convolutions that wrap, mirror or dilate out of target_modules, or pad in a layer before them.
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


def gaps(**conv):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, **conv))
    net = get_peft_model(net, LoraConfig(r=4, target_modules=["0"])).eval()
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 8, 16, 16)
    with torch.no_grad():
        apart = net(x)
        net.merge_adapter()
        gap = (apart - net(x)).abs()
    return gap.max().item(), gap[..., 4:-4, 4:-4].max().item()


for mode in ("zeros", "circular", "reflect", "replicate"):
    anywhere, inside = gaps(padding=1, padding_mode=mode)
    print(f"{mode}: merging changes the output by {anywhere:.1g}, away from the border by {inside:.1g}")
    assert inside < 1e-5 and (anywhere < 1e-5) == (mode == "zeros")
    assert anywhere < 1e-5 or anywhere > 0.5
anywhere, inside = gaps(padding="same", dilation=2)
print(f"dilation 2: {anywhere:.1g}, away from the border {inside:.1g}")
assert inside > 0.5
PY
