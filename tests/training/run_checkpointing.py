"""A small training run, started as its own process so that it can be killed: `run_checkpointing.py RUN STEPS`.

Prints each step's loss in hexadecimal, so that two runs can be compared bit for bit.
"""

import argparse
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from diffzoo.runs import RunLock, find_resume, list_checkpoints
from diffzoo.training import checkpoint_files
from diffzoo.training.checkpoint_files import CheckpointFiles
from diffzoo.training.checkpoint_io import BackgroundCheckpointIO, _HashingFile
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.ema import EMA


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
        callbacks=[EMA([0.9, 0.99], [0.1]), *(callbacks or []), Checkpointing(every, 0, keep)],
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


def child(log: Path, target: Callable, arguments: dict) -> None:
    """What a process of `Child` runs."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    target(**arguments)


# -- runs that end badly


def train_with(run: Path, callback: Checkpointing, steps: int = 10) -> None:
    globals()["Checkpointing"] = lambda *_: callback
    train(run, steps)


def killed_while_writing(run: Path, steps: int, at_write: int) -> None:
    """Dies by SIGKILL in the middle of the file, in checkpoint number 2."""
    write, count, saves, trains = _HashingFile.write, [0], [0], os.getpid()
    save = BackgroundCheckpointIO.save_checkpoint

    def counted_save(self, *args, **kwargs) -> None:
        saves[0] += 1
        count[0] = 0
        save(self, *args, **kwargs)

    def deadly_write(self, data) -> int:
        count[0] += 1
        if saves[0] == 2 and count[0] == at_write:
            write(self, bytes(data)[: len(data) // 2])
            self._file.flush()
            os.kill(trains, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    BackgroundCheckpointIO.save_checkpoint = counted_save
    _HashingFile.write = deadly_write
    train(run, steps)


def killed_between_writes(run: Path, steps: int, stage: str) -> None:
    """Dies by SIGKILL at a stage of the second checkpoint."""

    def die(*_: object) -> None:
        if list_checkpoints(run):
            os.kill(os.getpid(), signal.SIGKILL)

    place = {"before the checksum": "write_text", "before the rename": "os.replace"}.get(stage)
    if place == "write_text":
        checkpoint_files.write_text = _before(checkpoint_files.write_text, die)
    elif place == "os.replace":
        checkpoint_files.os = _Os(die)
    else:
        CheckpointFiles._rotate = _before(CheckpointFiles._rotate, lambda *_: len(list_checkpoints(run)) > 1 and die())
    train(run, steps)


def _before(function: Callable, act: Callable) -> Callable:
    def both(*args: object):
        act(*args)
        return function(*args)

    return both


class _Os:
    """The module `os` with a deadly `replace`."""

    def __init__(self, die: Callable) -> None:
        self._die = die

    def __getattr__(self, name: str):
        return _before(os.replace, self._die) if name == "replace" else getattr(os, name)


def full_disk(run: Path, steps: int) -> None:
    """The disk is full from the second checkpoint to the third."""
    write, saves, save = _HashingFile.write, [0], BackgroundCheckpointIO.save_checkpoint

    def counted_save(self, *args, **kwargs) -> None:
        saves[0] += 1
        save(self, *args, **kwargs)

    def full_write(self, data) -> int:
        if saves[0] in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    BackgroundCheckpointIO.save_checkpoint = counted_save
    _HashingFile.write = full_write
    checkpoint_files.rank_zero_warn = lambda text: print("warned:", text, flush=True)
    train(run, steps)


def with_limited_files(run: Path, steps: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    checkpoint_files.rank_zero_warn = lambda text: print("warned:", text, flush=True)
    train(run, steps)


def under_slurm(variables: dict[str, str], **arguments: Any) -> None:
    os.environ |= variables
    train(**arguments)


def hold(run: Path) -> None:
    with RunLock(run):
        print("held", flush=True)
        time.sleep(60)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("steps", type=int)
    for name, kind in (("every", int), ("accumulate", int), ("devices", int), ("sleep", float), ("validate", float)):
        parser.add_argument(f"--{name}", type=kind)
    train(**{k: v for k, v in vars(parser.parse_args()).items() if v is not None})


if __name__ == "__main__":
    main()
