"""Metrics during training on two processes: `python run_distributed_metrics.py FOLDER REFERENCE`.

Writes what each process logged and measured, and the EMA weights.
"""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from evaluation.test_training import Logged, Rows, Tiny
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from diffzoo.models.base import Config
from diffzoo.process import GaussianProcess
from diffzoo.sampling import DDIM
from diffzoo.training.ema import EMA, averaged
from diffzoo.training.image_metrics import ImageMetrics
from diffzoo.training.module import DiffusionModule

METRICS = ("frechet:random-conv", "inception-score:random-conv")


def main() -> None:
    folder, reference = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = DiffusionModule(
        Tiny(Config(image_size=16, num_classes=5)), process=GaussianProcess(), sampler=DDIM(steps=2),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    # seven batches for two processes: one of them takes a turn for nothing
    callback = ImageMetrics(reference, METRICS, every_n_steps=2, n=140, batch_size=20)
    logged = Logged()
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[EMA(decays=[0.5]), callback, logged], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(), batch_size=2), DataLoader(Rows(), batch_size=2))
    values = callback.measure(trainer, module)
    with averaged(module):
        state = {name: value.clone() for name, value in module.network.state_dict().items()}
    torch.save({"values": values, "logged": logged.seen, "state": state}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
