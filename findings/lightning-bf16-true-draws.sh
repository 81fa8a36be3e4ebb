#!/usr/bin/env bash
# Versions: torch 2.13.0, lightning 2.6.6
# Behaviour: with precision="bf16-true" the default dtype is bfloat16 inside `training_step`, and floats of the batch
#   are cast too. So torch.rand(b) draws times from under 2,000 values, of which one in 512 is exactly 0, and float time
#   steps 997, 998, 999 of a batch arrive as 996, 1000, 1000.
# Guess: only parameters and activations are in bfloat16; torch.rand keeps its 24 bits and is zero once in 16.7 million
#   draws.
# Seen: rand is torch.bfloat16, share of zeros 1/513, time steps [996.0, 1000.0, 1000.0]; with bf16-mixed no zeros,
#   [997.0, 998.0, 999.0].
# Advice: name the dtype of every draw and table in a training step, and keep times out of the batch or as integers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV_DIR:-$folder}/torch-2.13
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cd "$folder"
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PY'
import logging

import lightning
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
seen = {}


class Probe(lightning.LightningModule):
    def __init__(self, precision):
        super().__init__()
        self.layer, self.precision_name = torch.nn.Linear(2, 2), precision

    def training_step(self, batch, _):
        draws = torch.rand(2**20)
        seen[self.precision_name] = draws.dtype, (draws == 0).double().mean().item(), batch["time"].tolist()
        return self.layer(batch["x"]).float().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


rows = [{"x": torch.ones(2), "time": torch.tensor(t)} for t in (997.0, 998.0, 999.0)]
for precision in ("bf16-true", "bf16-mixed"):
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu", precision=precision, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Probe(precision), torch.utils.data.DataLoader(rows, 3))
    print(precision, *seen[precision])

dtype, zeros, times = seen["bf16-true"]
assert dtype == torch.bfloat16 and 1 / 700 < zeros < 1 / 400 and times == [996.0, 1000.0, 1000.0]
dtype, zeros, times = seen["bf16-mixed"]
assert dtype == torch.float32 and zeros < 1e-5 and times == [997.0, 998.0, 999.0]
PY
