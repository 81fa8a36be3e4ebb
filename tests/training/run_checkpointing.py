"""A small training run, started as its own process so that it can be killed: `run_checkpointing.py RUN STEPS`.

Prints each step's loss in hexadecimal, so that two runs can be compared bit for bit.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import nn

from diffzoo.training.averaging import WeightAverages
from diffzoo.training.checkpointing import Checkpoints, find_resume


class Module(L.LightningModule):
    def __init__(self, sleep: float, hold_validation: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.sleep, self.hold_validation = sleep, hold_validation

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(self.sleep)
        # what a step sees depends on its number: the place in the data is the data modules' affair
        place = batch_idx * self.trainer.world_size + self.global_rank
        x = torch.randn(batch.shape, generator=torch.Generator().manual_seed(place))
        loss = (self.network(x) - x).square().mean()
        print(f"step {self.global_step} {float(loss).hex()}", flush=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        print("validation", flush=True)
        time.sleep(self.hold_validation)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2, fused=True)


def train(
    run: Path,
    steps: int,
    every: int = 3,
    accumulate: int = 1,
    devices: int = 1,
    sleep: float = 0.0,
    validate: float = 0.0,
    callbacks: list[L.Callback] | None = None,
    keep: int = 3,
) -> Module:
    """Train, or go on where the run directory's newest sound checkpoint says."""
    warnings.simplefilter("ignore")
    trainer = L.Trainer(
        max_steps=steps,
        default_root_dir=run,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[WeightAverages([0.9, 0.99], [0.1]), *(callbacks or []), Checkpoints(every, 0, keep)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=4 if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        use_distributed_sampler=False,
    )
    resume = find_resume(run, lambda text: print(text, file=sys.stderr))
    held_out = torch.utils.data.DataLoader(torch.randn(4000, 8), batch_size=8) if validate else None
    module = Module(sleep, validate)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(8000, 8), batch_size=8), held_out, ckpt_path=resume)
    return module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("steps", type=int)
    for name, kind in (("every", int), ("accumulate", int), ("devices", int), ("sleep", float), ("validate", float)):
        parser.add_argument(f"--{name}", type=kind)
    train(**{k: v for k, v in vars(parser.parse_args()).items() if v is not None})


if __name__ == "__main__":
    main()
