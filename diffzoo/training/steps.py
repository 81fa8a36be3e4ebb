"""Callbacks that act once per optimizer step, where a step accumulates the gradients of several micro-batches."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StepCallback"]


class StepCallback(Callback):
    """Calls `after_step` when an optimizer step has been taken, and not while gradients are still being accumulated.

    Lightning's own hook comes after every micro-batch. A subclass with work for each of them overrides the hook, does
    that work and calls this one.
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
