"""When a run saves: at intervals, at the end, and when it is told to stop.

It saves only at the end of an optimizer step, where Lightning's counters, the weights, the EMA and the position in the
data agree. The files are in `checkpoint_files.py`, the signals in `stop_signals.py`.
"""

import time
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from diffzoo.errors import UserError
from diffzoo.runs import Run
from diffzoo.training.checkpoint_files import CheckpointFiles, remove_leftovers
from diffzoo.training.steps import StepCallback, is_trial
from diffzoo.training.stop_signals import Preempted, StopSignals, leave

__all__ = ["Checkpointing", "Preempted"]


class Checkpointing(StepCallback, Checkpoint):
    """Saves at intervals, at the end and when told to stop; keeps the newest few.

    A run of one process also saves when its data fails.

    On SIGTERM, SIGUSR1 or Ctrl-C the run finishes its step, saves, and exits with status 128 + signal; a second Ctrl-C
    ends it at once. Under SLURM with Lightning's auto-requeue, its signal also requeues the job. Any process may get
    the signal; the others follow at the same step.

    Args:
        every_n_steps: interval in optimizer steps; 0 = by time alone.
        every_minutes: interval in minutes of wall time; 0 = by steps alone.
        keep: how many of the newest checkpoints to keep.
        keep_every_n_steps: checkpoints at multiples of this are kept for ever; 0 = none.

    Raises:
        UserError: for a negative interval, or nothing to keep.
    """

    def __init__(self, every_n_steps: int = 0, every_minutes: float = 10.0, keep: int = 3, keep_every_n_steps: int = 0):
        super().__init__()
        if min(every_n_steps, every_minutes, keep_every_n_steps) < 0:
            raise UserError("the intervals of Checkpointing must not be negative: use 0 for none")
        if keep < 1:
            raise UserError(f"Checkpointing must keep at least 1, got {keep}; 2 or more survive a damaged one")
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._files = CheckpointFiles(keep, keep_every_n_steps)
        self._signals = StopSignals()
        self._agreement: torch.distributed.ProcessGroup | None = None
        self._saved_step = -1
        self._saved_time = time.monotonic()
        self._between_batches = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._files.attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = self._step
        self._saved_time = time.monotonic()
        self._signals.listen(trainer)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            # the processes agree over gloo on the host, so that nobody waits for the device
            self._agreement = cast("torch.distributed.ProcessGroup", torch.distributed.new_group(backend="gloo"))
        if trainer.is_global_zero:
            remove_leftovers(self.folder(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._files.wait_before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._between_batches = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        if is_trial(trainer):
            return
        received, due = self._agree(self._signals.received, self._is_due(trainer))
        if received or due:
            self.save(trainer, wait=bool(received))
        if received:
            self._signals.restore()
            leave(trainer, received)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._between_batches = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._between_batches = False

    def on_validation_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        if trainer.sanity_checking or not self._signals.listening:
            return
        received, _ = self._agree(self._signals.received, False)
        if received:  # ends the validation early; the end of the next step saves and stops
            raise StopIteration

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial(trainer) and self._saved_step != trainer.global_step:
            self.save(trainer)
        self._files.wait()
        self._signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.restore()
        if not isinstance(exception, KeyboardInterrupt):
            self._files.wait()
        # The data failed. With several processes the others are waiting in a step by now: nothing can be saved.
        failed = self._between_batches and isinstance(exception, UserError) and trainer.world_size == 1
        if failed and not is_trial(trainer) and trainer.global_step not in (0, self._saved_step):
            _forget_unfinished_step(trainer)
            path = self.save(trainer)
            if path is not None:
                rank_zero_info(f"saved {path} before leaving: --resume auto goes on from there")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.restore()

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Where the checkpoints of a run lie."""
        return Run(Path(trainer.default_root_dir)).checkpoints

    def save(self, trainer: Trainer, wait: bool = True) -> Path | None:
        """Save now; every process must call it, at the end of an optimizer step.

        Without `wait`, training goes on while the file is written, and a failure is reported when it is known.

        Returns:
            the path, or None if the disk failed, which is reported; the checkpoints there already are kept.
        """
        path = self.folder(trainer) / f"step_{trainer.global_step:08d}.ckpt"
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        return path if self._files.write(trainer, path, wait) else None

    def _is_due(self, trainer: Trainer) -> bool:
        by_steps = self.every_n_steps and self._step % self.every_n_steps == 0
        by_time = self.every_minutes and time.monotonic() - self._saved_time >= 60 * self.every_minutes
        # the last step too: at the end of training Lightning's counters have moved on to the next epoch
        return bool(by_steps or self._files.is_permanent(self._step) or by_time or 0 < trainer.max_steps <= self._step)

    def _agree(self, received: int, due: bool) -> tuple[int, bool]:
        """The maximum over all processes, so that they act at the same step."""
        if self._agreement is None:
            return received, due
        wishes = torch.tensor([received, int(due)])
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self._agreement)
        return int(wishes[0]), bool(wishes[1])


def _forget_unfinished_step(trainer: Trainer) -> None:
    """Take back the count of micro-batches whose gradients have not reached the weights: a resume sees them again."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unfinished = progress.current.ready % trainer.accumulate_grad_batches
    for count in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(count, name, getattr(count, name) - unfinished)
