#!/usr/bin/env bash
# Versions: torch 2.14.1, torchvision 0.29.1, rectified-flow-pytorch 0.14.0
# Behaviour: RectifiedFlow.predict_flow takes the network to call and calls self.model whatever it is given. So
#   sample(use_ema=True) samples from the weights of the last step, and the consistency loss compares the network with
#   itself instead of with its average. The average is kept, not used; the package's Trainer then keeps no other.
# Guess: use_ema=True samples from averaged weights.
# Seen: the two samples are equal to the bit, while the weights are 0.04 apart; with an average of NaN samples and
#   losses stay finite.
# Advice: sample from a second RectifiedFlow around flow.ema_model.ema_model, and train without use_consistency.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.14
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 rectified-flow-pytorch==0.14.0
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import torch
from rectified_flow_pytorch import RectifiedFlow


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, times):
        return self.layer(x)


torch.manual_seed(0)
net = Net()
flow = RectifiedFlow(net, use_consistency=True, data_shape=(3, 8, 8))
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(300):
    optimizer.zero_grad()
    flow(torch.rand(16, 3, 8, 8)).backward()
    optimizer.step()
    flow.post_training_step_update()
average = flow.ema_model.ema_model
noise = torch.randn(4, 3, 8, 8)
averaged, last = (flow.sample(4, noise=noise, use_ema=use_ema) for use_ema in (True, False))
other = RectifiedFlow(average, data_shape=(3, 8, 8)).sample(4, noise=noise)
apart = (average.layer.weight - net.layer.weight).abs().max().item()
print(f"weights apart by {apart:.2g}, samples with and without use_ema by {(averaged - last).abs().max():.2g},")
print(f"  those of a flow around the average by {(other - last).abs().max():.2g}")
assert apart > 0.01 and torch.equal(averaged, last) and (other - last).abs().max() > 0.01
for p in average.parameters():
    p.data.fill_(float("nan"))
sample = flow.sample(4, noise=noise, use_ema=True)
_, losses = flow(torch.rand(16, 3, 8, 8), return_loss_breakdown=True)
print(f"with an average of NaN: samples finite: {sample.isfinite().all().item()}, consistency {losses.data_match:.2g}")
assert torch.equal(sample, last) and losses.total.isfinite()
PY
