#!/usr/bin/env bash
# Versions: torch 2.13.0, lightning 2.6.6
# Behaviour: with accumulate_grad_batches=4 an epoch of 6 batches ends in a window of 2, which is stepped with its sum
#   divided by 4: half the gradient, and the average that clipping, logged norms and Adam's moments see jumps at each
#   epoch's end.
# Guess: the last window is averaged over the batches that it has.
# Seen: batches of constant gradient 1, two epochs: gradients at the optimizer 1.0, 0.5, 1.0, 0.5.
# Advice: drop the incomplete window, or make epochs a multiple of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import logging

import lightning
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Constant(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, _):
        return (self.weight * batch).mean()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


module = Constant()
trainer = lightning.Trainer(
    max_epochs=2, accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, torch.utils.data.DataLoader(torch.ones(6, 1)))
print(module.seen)
assert module.seen == [1.0, 0.5, 1.0, 0.5]
PY
