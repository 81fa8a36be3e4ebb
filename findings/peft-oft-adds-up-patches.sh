#!/usr/bin/env bash
# Versions: torch 2.13.0, peft 0.21.2
# Behaviour: OFT rotates the input of a convolution: it cuts the image into patches, rotates each and folds them back
#   with torch's fold, which adds up what overlaps. Under a 3 x 3 kernel a pixel is in nine patches, so the rotation by
#   zero, which training starts from, multiplies the image by nine and a corner by one. Merging rotates the kernel
#   instead, as it should be, and so gives another network. Linear layers and kernels of 1 x 1 are as they should be.
# Guess: a new adapter changes nothing, and merging changes rounding only, as for BOFT and HRA.
# Seen: a new OFT adapter moves the output of a 3 x 3 convolution by 2.9 times its norm. Training starts at a loss of
#   4.1 instead of 0.010; after 200 steps it is 0.097, and 0.035 when merged. BOFT goes from 0.010 to 0.003, merged too.
# Advice: BOFT or HRA for convolutions, and compare the output before and after adding an adapter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import copy
import logging

import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, get_peft_model

logging.disable(logging.WARNING)
torch.manual_seed(0)
x = torch.randn(8, 8, 16, 16)


def gap(a, b):
    return ((a - b).norm() / b.norm()).item()


for config in (OFTConfig(oft_block_size=8), BOFTConfig(boft_block_size=8), HRAConfig(r=8)):
    config.target_modules = ["0"]
    seen = {}
    for size in (1, 3):
        base = torch.nn.Sequential(torch.nn.Conv2d(8, 16, size, padding=size // 2))
        y = base(x)
        net = get_peft_model(base, config)
        seen[size] = gap(net(x), y), gap(net.merge_and_unload()(x), y)
    name = config.peft_type.value
    print(f"a new {name} adapter moves a 1 x 1 convolution by {seen[1][0]:.2g}, a 3 x 3 one by {seen[3][0]:.2g};")
    print(f"  when merged by {seen[1][1]:.2g} and {seen[3][1]:.2g}")
    assert seen[1][0] < 1e-5 and max(seen[1][1], seen[3][1]) < 1e-5
    assert seen[3][0] > 2 if name == "OFT" else seen[3][0] < 1e-5

summing = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1, bias=False))
summing[0].weight.data.zero_()[0, 0, 1, 1] = 1
net = get_peft_model(summing, OFTConfig(oft_block_size=9, target_modules=["0"]))
print("the kernel that returns its input, given ones:", net(torch.ones(1, 1, 6, 6))[0, 0, 0].tolist(), "at the edge,")
print("  inside", net(torch.ones(1, 1, 6, 6))[0, 0, 3].tolist())
assert net(torch.ones(1, 1, 6, 6))[0, 0].max() == 9

base = torch.nn.Sequential(
    torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 8, 3, padding=1)
)
y = base(x).detach() + 0.1 * x


def loss(net):
    return (net(x) - y).square().mean()


for config in (OFTConfig(oft_block_size=8), BOFTConfig(boft_block_size=8)):
    config.target_modules = ["0", "2"]
    net = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    first = loss(net).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
    name, trained, merged = config.peft_type.value, loss(net).item(), loss(net.merge_and_unload()).item()
    print(f"{name}: loss of the base {loss(base):.4f}, of a new adapter {first:.4f},")
    print(f"  trained {trained:.4f}, merged {merged:.4f}")
    if name == "OFT":
        assert first > 100 * loss(base) and trained > 2 * loss(base) and abs(merged / trained - 1) > 0.3
    else:
        assert abs(first / loss(base) - 1) < 1e-3 and trained < 0.5 * loss(base) and abs(merged / trained - 1) < 1e-3
PY
