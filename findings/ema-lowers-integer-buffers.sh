#!/usr/bin/env bash
# Versions: torch 2.13.0, lightning 2.6.6
# Behaviour: get_ema_multi_avg_fn averages integer buffers too, in float32, and cuts the result to an integer:
#   11 * 0.9999 + 11 * 0.0001 is 10.999999, hence 10. AveragedModel does so with use_buffers=True, Lightning's
#   EMAWeightAveraging by default. A table of indices, as of relative positions, is silently another one.
# Guess: a buffer that never changes is its own average.
# Seen: of a window's 225 relative positions 40 are one too small at a decay of 0.9999, 69 at 0.9995, none at the
#   default of 0.999: attention reads a neighbour's bias.
# Advice: use_buffers=False, which copies buffers, or keep tables of indices out of buffers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import logging

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


class Bias(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(225))
        self.register_buffer("relative_position_index", torch.arange(225))

    def training_step(self, batch, _):
        return (self.table[self.relative_position_index] - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def wrong(net):
    return (net.relative_position_index != torch.arange(225)).sum().item()


seen = {}
for decay in (0.999, 0.9995, 0.9999):
    net = Bias()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(100):
        average.update_parameters(net)
    seen[decay] = wrong(average.module)
    assert (average.module.relative_position_index - torch.arange(225)).min() >= -1
print("wrong indices of 225:", seen)
assert seen[0.999] == 0 and seen[0.9995] > 10 and seen[0.9999] > 10
net = Bias()
trainer = L.Trainer(
    max_steps=5,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=EMAWeightAveraging(decay=0.9999),
)
trainer.fit(net, torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1))
print("after five steps with EMAWeightAveraging(decay=0.9999):", wrong(net))
assert wrong(net) == seen[0.9999]
PY
