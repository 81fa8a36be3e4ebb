"""`DiffusionModule` on the real data module, in one process or two, for the tests of scale.

`run(folder, kind, families)` trains a few steps of each family. `kind` is one of

    single    one process, the whole batch
    ddp       two processes, gloo
    fsdp      two processes, FSDP2, gloo; checkpoints in shards, and a preview at the end
    fsdp+     the same with activation checkpointing and two micro-batches per step; checkpoints in one file

The loss of the global batch at each step, and the EMA weights, are left in `folder/kind/family.pt`.
"""

import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import diffzoo.models  # noqa: F401  registers the families
from diffzoo.data import DemoData
from diffzoo.models import entry, list_models
from diffzoo.runs import find_resume
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.ema import EMA
from diffzoo.training.guards import GradientGuard
from diffzoo.training.held_out import HeldOutDistance
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optimizers import FusedAdamW, TimmOptimizer
from diffzoo.training.previews import SampleGrid
from diffzoo.training.training_log import TrainingLog

STEPS = 4


def network(family: str) -> Any:
    """A small network of the family for the demo images at 16 px, perturbed so that nothing is zero."""
    cls = next(entry(n).network for n in list_models() if entry(n).network.__name__ == family)
    config = sys.modules[cls.__module__].TINY
    changes = {"num_classes": 10, "null_class": True, "in_channels": 3}
    if family == "ADMUNet":
        changes["learned_variance"] = False
    if family != "UViTBao":  # which has none
        changes["dropout"] = 0.0
    torch.manual_seed(0)
    made = cls(config.override(**changes))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return made


class Losses(L.Callback):
    """The mean loss over the global batch of every optimizer step."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.found: dict[int, float] = {}
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.parts.append(module.last_losses[1].mean())
        if trainer.global_step == self.step:
            return
        self.step, mean = trainer.global_step, torch.stack(self.parts).mean()
        self.parts = []
        if trainer.world_size > 1:
            dist.all_reduce(mean)
            mean /= trainer.world_size
        self.found[self.step] = float(mean)


def strategy(kind: str) -> Any:
    if kind == "single":
        return "auto"
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=kind == "fsdp",
    )


OPTIMIZERS = {
    "adamw": lambda p: FusedAdamW(p, lr=1e-3, eps=1e-4),
    "muon": lambda p: TimmOptimizer(p, "muon", lr=1e-3, options={"eps": 1e-4}),
}


def train(folder: Path, kind: str, family: str, steps: int, optimizer: str) -> None:
    warnings.simplefilter("ignore")
    module = DiffusionModule(network(family), optimizer=OPTIMIZERS[optimizer], grad_checkpointing=kind == "fsdp+")
    parts = 2 if kind == "fsdp+" else 1
    data = DemoData(
        image_size=16, batch_size=8, micro_batch_size=4 // parts if parts > 1 else None, num_workers=0, cache=False
    )
    averages, losses = EMA([0.5]), Losses()
    held_out = HeldOutDistance("frechet:random-conv", 2, None, n=8, steps=1, batch_size=2)
    place = folder / kind / family
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1 if kind == "single" else 2, strategy=strategy(kind),
        accumulate_grad_batches=parts, gradient_clip_val=1.0, default_root_dir=place, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[
            averages, GradientGuard(), TrainingLog(), losses, held_out, Checkpointing(every_n_steps=2, every_minutes=0),
            *([SampleGrid(0, classes=[0], per_class=2, final_steps=1)] if kind == "fsdp" else []),
        ],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=find_resume(place))
    state = averages.network_state(module)
    if trainer.is_global_zero:
        torch.save(
            {"losses": losses.found, "state": state, "best": (held_out.best_step, held_out.best)},
            place.with_suffix(f".{steps}.pt"),
        )


def work(
    rank: int, folder: Path, kind: str, families: list[str], port: int, stops: tuple[int, ...], optimizer: str
) -> None:
    torch.set_num_threads(1)
    if kind != "single":  # as torchrun sets it: Lightning then starts no process of its own
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for family in families:
        for steps in stops:
            train(folder, kind, family, steps, optimizer)


def run(
    folder: Path, kind: str, families: list[str], stops: tuple[int, ...] = (STEPS,), optimizer: str = "adamw"
) -> None:
    """Train; with several `stops` the run ends at each and is resumed from its checkpoint."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if kind == "single":
        work(0, folder, kind, families, port, stops, optimizer)
    else:
        arguments = (folder, kind, families, port, stops, optimizer)
        mp.start_processes(work, arguments, nprocs=2, start_method="forkserver")
