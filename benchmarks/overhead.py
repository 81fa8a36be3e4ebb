"""What part of a training step the data, the averages and Lightning take, on a network of 100 M parameters.

    python benchmarks/overhead.py                                                  # 8 pictures a step, CPU
    python benchmarks/overhead.py --batch 128 --precision bf16-mixed --compile     # one GPU

A run as `diffzoo fit` makes it: `DiffusionModule`, a `Trainer` with the loggers and callbacks that every run has, the
demo pictures (decoded from their file at first sight, so the first pass is the dear one) and an average of the weights.
Two figures come out:

    by the clock   the parts of a step that no loop could do without are timed where they happen: diffusing, network and
                   loss; backward; clipping and AdamW. What a step takes beyond these is overhead, by kind.
                   The guard takes the norm that clipping needs, and AdamW applies the clip factor; so the last line
                   compares clipping and AdamW with those of the plain loop as well.
    in turns       after each step of the trainer a plain loop takes one, on the same network, optimizer and precision,
                   with pictures that lie in memory and noise from `torch.randn`. What the trainer's step takes longer
                   than the mean of the loop's steps before and after it, as a share of it, also contains what the
                   trainer may slow down inside those parts. Steps vary by more than the overhead: mind the quartiles.

Shares are medians over the steps. Writing of checkpoints and drawing of previews are left out: they cost what their
intervals make them cost. On a GPU every stamp waits for the device, so what would overlap counts in full.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from diffzoo import create_model
from diffzoo.data import DemoData
from diffzoo.process import denoising_loss
from diffzoo.training import (
    EMA,
    Checkpointing,
    DiffusionModule,
    FusedAdamW,
    GradientGuard,
    RunProgress,
    TrainingLog,
)
from diffzoo.training.training_log import CsvLog
from diffzoo.typing import Condition

CORE = ("diffusing, network, loss", "backward", "clipping, AdamW")
CLIP = 1.0


class Clock:
    """Seconds by part since the last `take`."""

    def __init__(self, device: str):
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Seconds; waits for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        """What was spent, and start anew."""
        spent, self.spent = self.spent, defaultdict(float)
        return spent

    def time(self, thing: Any, method: str, part: str) -> None:
        """Count all calls of a method of one object to a part."""
        inner: Callable[..., Any] = getattr(thing, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent[part] += self.now() - start

        setattr(thing, method, timed)


class TimedBatches:
    """The batches of a loader, waited for by the clock."""

    def __init__(self, loader: Any, clock: Clock):
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = self.clock.now()
        batch = next(self.loader)
        self.clock.spent["data"] += self.clock.now() - start
        return batch

    def close(self) -> None:
        """End the workers."""
        self.loader.close()


class TimedData(DemoData):
    """The demo pictures, waited for by the clock."""

    clock: Clock

    def make_worker_loader(self, position: int) -> Any:
        """As it is, but timed."""
        return TimedBatches(super().make_worker_loader(position), self.clock)


class Unsaved(Checkpointing):
    """All but the writing."""

    def save(self, trainer: L.Trainer, wait: bool = True) -> None:
        """Nothing."""


class PlainLoop:
    """A training step as a script without a framework has it, on the weights and the optimizer of a trainer."""

    def __init__(self, trainer: L.Trainer, module: DiffusionModule, batch: int, clock: Clock):
        self.module, self.optimizer, self.clock = module, trainer.optimizers[0], clock
        self.clipping: list[float] = []
        self.precision = trainer.precision_plugin
        self.parameters = list(module.network.parameters())
        size = module.network.config.image_size
        self.pictures = torch.rand(batch, 3, size, size, device=module.device) * 2 - 1
        classes = module.network.config.num_classes
        self.cond = Condition(label=torch.arange(batch, device=module.device) % classes)

    def step(self) -> None:
        """One step."""
        x, process = self.pictures, self.module.process
        t, eps = torch.rand(len(x), device=x.device), torch.randn_like(x)
        with self.precision.forward_context():
            out = self.module.network(process.add_noise(x, eps, t), process.noise_level(t), self.cond)
            loss = denoising_loss(process, self.module.weighting, (out.float(),), x, eps, t).mean()
        self.optimizer.zero_grad()
        loss.backward()
        start = self.clock.now()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.clipping.append(self.clock.now() - start)


class Turns(L.Callback):
    """Closes the books after each of the trainer's steps, then lets the loop take one; the last but `Checkpointing`."""

    def __init__(self, clock: Clock, batch: int, warm_up: int):
        self.clock, self.batch, self.warm_up = clock, batch, warm_up
        self.parts: list[dict[str, float]] = []
        self.trainer_steps: list[float] = []
        self.loop_steps: list[float] = []
        self.loop: PlainLoop | None = None
        self._start = self._stamp = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.loop = PlainLoop(trainer, pl_module, self.batch, self.clock)
        # the optimizer's own step runs the closure, which ends with the hooks before it
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._close(CORE[2]))
        self._take_turn()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._stamp = self.clock.now()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(CORE[1])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._stamp = self.clock.now()

    def _close(self, part: str) -> None:
        self.clock.spent[part] += self.clock.now() - self._stamp

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.trainer_steps.append(self.clock.now() - self._start)
        self.parts.append(self.clock.take())
        self._take_turn()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # the loop took a turn before the first of the trainer's steps, so there is one on either side of each
        for taken in (self.parts, self.trainer_steps, self.loop_steps):
            del taken[: self.warm_up]

    def _take_turn(self) -> None:
        assert self.loop is not None
        start = self.clock.now()
        self.loop.step()
        self.loop_steps.append(self.clock.now() - start)
        self.clock.take()  # the loop's optimizer is the trainer's, hook included
        self._start = self.clock.now()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="simple_uvit_s_64", help="one with classes that reads pixels")
    parser.add_argument("--depth", type=int, default=17, help="transformer blocks; 0 = the model's own number")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of each that count")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="the trainer's, such as bf16-mixed")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def build(args: argparse.Namespace, clock: Clock) -> tuple[DiffusionModule, TimedData, list[L.Callback]]:
    """Module, data and callbacks, timed."""
    network_args: dict[str, Any] = {"num_classes": 10}
    if args.depth:
        with torch.device("meta"):
            coarsest = create_model(args.model).config.levels[-1].resolution
        network_args["depth_at"] = {coarsest: args.depth}
    module = DiffusionModule(args.model, network_args, optimizer=FusedAdamW, compile=args.compile)
    data = TimedData(image_size=module.network.config.image_size, batch_size=args.batch)
    data.clock = clock
    guard, throughput, progress = GradientGuard(), TrainingLog(), RunProgress(line_every_seconds=3600)
    averages = EMA([1 - 10.0 ** -(n + 4) for n in range(args.averages)])
    checkpoints = Unsaved()
    clock.time(module, "transfer_batch_to_device", "data")
    clock.time(module, "losses", CORE[0])
    clock.time(averages, "on_train_batch_end", "averages")
    for method in ("on_before_optimizer_step", "on_train_batch_end"):
        clock.time(guard, method, "guard against bad steps")
    for callback in (throughput, progress, checkpoints):
        clock.time(callback, "on_train_batch_end", "loss, speed, progress")
    turns = Turns(clock, args.batch, args.warm_up)
    return module, data, [averages, guard, throughput, progress, turns, checkpoints]


def report(turns: Turns, args: argparse.Namespace) -> None:
    """Print the shares."""
    kinds = ("data", "averages", "guard against bad steps", "loss, speed, progress")
    shares: dict[str, list[float]] = defaultdict(list)
    for parts, taken in zip(turns.parts, turns.trainer_steps, strict=True):
        core = sum(parts[name] for name in CORE)
        for name in (*CORE, *kinds):
            shares[name].append(parts[name] / taken)
        shares["Lightning, noise, the rest"].append((taken - core - sum(parts[k] for k in kinds)) / taken)
        shares["together"].append((taken - core) / taken)
    step = statistics.median(turns.trainer_steps)
    for name in (*CORE, *kinds, "Lightning, noise, the rest", "together"):
        share = statistics.median(shares[name])
        indent = "" if name in (*CORE, "together") else "  "
        print(f"{indent + name:<28} {1e3 * share * step:9.1f} ms  {100 * share:6.2f} %")
    assert turns.loop is not None
    theirs = statistics.median(turns.loop.clipping)
    more = statistics.median(shares["together"]) + statistics.median(shares[CORE[2]]) - theirs / step
    print(f"{'the same of the loop':<28} {1e3 * theirs:9.1f} ms  {100 * theirs / step:6.2f} %   (its clipping, AdamW)")
    print(f"{'more than the loop':<28} {1e3 * more * step:9.1f} ms  {100 * more:6.2f} %")
    loops = [(a + b) / 2 for a, b in itertools.pairwise(turns.loop_steps)]
    slower = [100 * (t - p) / t for t, p in zip(turns.trainer_steps, loops, strict=True)]
    low, middle, high = statistics.quantiles(slower, n=4)
    print(f"\nin turns: trainer {step:.3f} s, loop {statistics.median(turns.loop_steps):.3f} s a step; ", end="")
    print(f"share {middle:.2f} % (quartiles {low:.2f} to {high:.2f}, {args.steps} pairs)")


def main() -> None:
    """Measure and print."""
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock(args.device)
    torch.manual_seed(0)
    module, data, callbacks = build(args, clock)
    with tempfile.TemporaryDirectory(prefix="diffzoo-overhead-") as folder:
        trainer = L.Trainer(
            max_steps=args.warm_up + args.steps,
            accelerator="gpu" if args.device.startswith("cuda") else args.device,
            devices=1,
            precision=args.precision,
            gradient_clip_val=CLIP,
            callbacks=callbacks,
            logger=[CsvLog(folder), TensorBoardLogger(folder, name="", version="tensorboard")],
            default_root_dir=folder,
            limit_val_batches=0,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} CPU thread(s)"
    size = module.network.num_parameters() / 1e6
    print(f"{args.model}, {size:.1f} M parameters, batch {args.batch}, {args.precision}, {where}\n")
    report(next(c for c in callbacks if isinstance(c, Turns)), args)


if __name__ == "__main__":
    main()
