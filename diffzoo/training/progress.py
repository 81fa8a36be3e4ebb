"""The progress of a run: one bar over all steps on a terminal and in a notebook, plain lines elsewhere."""

import time
from collections import deque
from statistics import median
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from diffzoo.progress import moves
from diffzoo.training.batch_format import size_of
from diffzoo.training.steps import StepCallback, loss_of

__all__ = ["RunProgress"]


class RunProgress(StepCallback, ProgressBar):
    """Steps done and left, images per second, smoothed loss.

    Args:
        line_every_seconds: interval of the lines that replace the bar where output is not a terminal.
    """

    def __init__(self, line_every_seconds: float = 60.0):
        super().__init__()
        self.line_every_seconds = line_every_seconds
        self._bar: tqdm | None = None
        self._enabled = True
        self._loss = self._rate = None  # type: float | None
        self._stamp = self._line_stamp = self._step_stamp = 0.0
        self._durations: deque[float] = deque(maxlen=200)  # seconds per step

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stamp = self._line_stamp = self._step_stamp = time.monotonic()
        if self._enabled and trainer.is_global_zero and moves():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar = tqdm(total=total, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        now = time.monotonic()
        images = size_of(batch) * trainer.world_size
        rate = images / max(now - self._stamp, 1e-9)
        self._stamp = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        # reading the loss waits for the device, so it is done every few steps
        loss = loss_of(outputs)
        if loss is not None and (trainer.global_step % 10 == 0 or self._loss is None):
            self._loss = float(loss) if self._loss is None else 0.9 * self._loss + 0.1 * float(loss)
        if self._bar is not None:
            self._bar.set_postfix_str(self._speed(), refresh=False)
            self._bar.total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar.update(trainer.global_step - self._bar.n)
        elif now - self._line_stamp > self.line_every_seconds:
            self._line_stamp = now
            print(self._line(trainer), flush=True)

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._durations.append(self._stamp - self._step_stamp)
        self._step_stamp = self._stamp

    def _line(self, trainer: L.Trainer) -> str:
        left = ""
        if trainer.max_steps > 0 and self._durations:
            # the median leaves out the first steps, previews and validation
            seconds = median(self._durations) * (trainer.max_steps - trainer.global_step)
            left = f"/{trainer.max_steps}, {int(seconds // 60)} min {int(seconds % 60):02d} s left"
        return f"step {trainer.global_step}{left}, {self._speed()}"

    def _speed(self) -> str:
        return f"{self._rate or 0:.0f} images/s" + ("" if self._loss is None else f", loss {self._loss:.4f}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args: object, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.write(" ".join(map(str, args)))
        elif self._enabled:
            print(*args, **kwargs)
