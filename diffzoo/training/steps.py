"""Callbacks that act once per optimizer step, and what callbacks ask of a trainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["StepCallback", "callback_of", "data_of", "ended", "is_trial", "loss_of", "say"]

C = TypeVar("C", bound=Callback)

say = rank_zero_only(print)  # Lightning's own log is hidden on the command line


def callback_of(trainer: Trainer, kind: type[C]) -> C | None:
    """The first callback of a class."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, kind)), None)


def loss_of(outputs: object) -> Tensor | None:
    """The mean loss of a training step, as Lightning hands it to callbacks."""
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, Tensor) else None


def data_of(trainer: Trainer) -> LightningDataModule:
    """The data module that the run was started with."""
    return trainer.datamodule  # type: ignore[attr-defined]


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a trial run (`fast_dev_run`), which leaves no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def ended(trainer: Trainer) -> bool:
    """Whether training has come to its end: it was not interrupted, and no trial."""
    return not is_trial(trainer) and not trainer.interrupted


class StepCallback(Callback):
    """Calls `after_step` when an optimizer step has been taken, and not while gradients are still being accumulated.

    Lightning calls `on_train_batch_end` after every micro-batch. A subclass that has work to do then overrides it and
    calls this one.
    """

    _step = -1  # the last optimizer step that was seen

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.after_step(trainer, cast("DiffusionModule", pl_module))

    def after_step(self, trainer: Trainer, module: "DiffusionModule") -> None:
        """An optimizer step was taken; `trainer.global_step` counts it."""
        raise NotImplementedError
