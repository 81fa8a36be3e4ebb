"""Callbacks that act once per optimizer step, whatever the number of micro-batches in it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StepCallback", "ended"]


def ended(trainer: Trainer) -> bool:
    """Whether training has come to its end: it was not interrupted, and no trial (`fast_dev_run`)."""
    return not getattr(trainer, "fast_dev_run", False) and not trainer.interrupted


class StepCallback(Callback):
    """Calls `after_step` when an optimizer step has been taken, and not while gradients are still being accumulated.

    Lightning calls `on_train_batch_end` after every micro-batch. A subclass that has work to do then overrides it and
    calls this one.
    """

    _step = -1  # the last optimizer step that was seen

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.after_step(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An optimizer step was taken; `trainer.global_step` counts it."""
        raise NotImplementedError
