"""Checkpoints: atomic, checksummed and rotated; also written when the run is told to stop.

A checkpoint is written under a temporary name, flushed and renamed, so that a process killed at any moment leaves the
earlier ones untouched. Its checksum file (`diffzoo.runs`) is written before the rename. Training goes on meanwhile
(`checkpoint_io.py`).

A run saves only at the end of an optimizer step, where Lightning's counters, the weights, the EMA and the position in
the data agree.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.runs import Run, checksum_file, checksum_lines, list_checkpoints, step_of
from diffzoo.training.checkpoint_io import BackgroundCheckpointIO
from diffzoo.training.steps import StepCallback, is_trial

__all__ = ["Checkpointing", "Preempted"]

PATIENCE = 2.0  # seconds that an optimizer step waits for a checkpoint that shares memory with it


class Preempted(SystemExit):
    """The run was told to stop and has saved its checkpoint; the exit status is 128 + the signal's number."""


def _forget_unfinished_step(trainer: Trainer) -> None:
    """Take back the count of micro-batches whose gradients have not reached the weights: a resume sees them again."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    unfinished = progress.current.ready % trainer.accumulate_grad_batches
    for count in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(count, name, getattr(count, name) - unfinished)


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
        self.keep, self.keep_every_n_steps = keep, keep_every_n_steps
        self._io: BackgroundCheckpointIO | None = None
        self._finishing: threading.Thread | None = None  # of the checkpoint that is being written
        self._sharing: threading.Thread | None = None  # the same, until an optimizer step has waited for it
        self._agreement: torch.distributed.ProcessGroup | None = None
        self._saved_step = -1
        self._failed = False  # whether the disk failed at the last one
        self._error: Exception | None = None
        self._saved_time = time.monotonic()
        self._signal = 0
        self._between_batches = False
        self._replaced: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._process = os.getpid()

    # -- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._io is None:
            self._io = BackgroundCheckpointIO()
            with suppress(NotImplementedError, AttributeError):  # strategies that write shards by themselves
                trainer.strategy.checkpoint_io = self._io

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = self._step
        self._saved_time = time.monotonic()
        self._listen(trainer)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            # the processes agree over gloo on the host, so that nobody waits for the device
            self._agreement = cast("torch.distributed.ProcessGroup", torch.distributed.new_group(backend="gloo"))
        if trainer.is_global_zero:
            _remove_leftovers(self.folder(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._between_batches = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # the step changes all memory that a forked child has not written yet, and the system would keep it twice
        writer, self._sharing = self._sharing, None
        if writer is not None:
            writer.join(PATIENCE)

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        if is_trial(trainer):
            return
        received, due = self._agree(self._signal, self._is_due(trainer))
        if received or due:
            self.save(trainer, wait=bool(received))
        if received:
            self._leave(trainer, received)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._between_batches = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._between_batches = False

    def on_validation_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        if trainer.sanity_checking or not self._replaced:
            return
        received, _ = self._agree(self._signal, False)
        if received:  # ends the validation early; the end of the next step saves and stops
            raise StopIteration

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial(trainer) and self._saved_step != trainer.global_step:
            self.save(trainer)
        self._wait()
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening()
        if not isinstance(exception, KeyboardInterrupt):
            self._wait()
        # The data failed. With several processes the others are waiting in a step by now: nothing can be saved.
        failed = self._between_batches and isinstance(exception, UserError) and trainer.world_size == 1
        if failed and not is_trial(trainer) and trainer.global_step not in (0, self._saved_step):
            _forget_unfinished_step(trainer)
            path = self.save(trainer)
            if path is not None:
                rank_zero_info(f"saved {path} before leaving: --resume auto goes on from there")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_listening()

    def _is_due(self, trainer: Trainer) -> bool:
        by_steps = self.every_n_steps and self._step % self.every_n_steps == 0
        permanent = self.keep_every_n_steps and self._step % self.keep_every_n_steps == 0
        by_time = self.every_minutes and time.monotonic() - self._saved_time >= 60 * self.every_minutes
        # the last step too: at the end of training Lightning's counters have moved on to the next epoch
        return bool(by_steps or permanent or by_time or 0 < trainer.max_steps <= self._step)

    def _agree(self, received: int, due: bool) -> tuple[int, bool]:
        """The maximum over all processes, so that they act at the same step."""
        if self._agreement is None:
            return received, due
        wishes = torch.tensor([received, int(due)])
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self._agreement)
        return int(wishes[0]), bool(wishes[1])

    # -- saving

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
        self._wait()
        final = self.folder(trainer) / f"step_{trainer.global_step:08d}.ckpt"
        partial = final.with_name(f".{final.name}.part")
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        trainer.save_checkpoint(partial, weights_only=False)
        self._failed = False
        if trainer.is_global_zero:
            self._finishing = threading.Thread(target=self._finish, args=(partial, final), daemon=True)
            self._finishing.start()
            self._sharing = self._finishing if self._io is not None and self._io.shares_memory else None
        if wait or partial.is_dir():  # shards are written already
            self._wait()
        trainer.strategy.barrier("diffzoo.checkpoints")
        return None if self._failed else final

    def _wait(self) -> None:
        """Wait for the checkpoint that is being written; raises what went wrong, except for disk errors."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish(self, partial: Path, final: Path) -> None:
        """Wait for the file, then checksum, rename and rotate."""
        try:
            digest = self._io.finish() if self._io is not None else ""
            lines = checksum_lines(partial, digest).replace(partial.name, final.name)
            _remove(final)  # from an earlier attempt at this run, or damaged
            write_text(checksum_file(final), lines)
            os.replace(partial, final)
            _flush_folder(final.parent)
            self._rotate(final)
        except OSError as error:
            self._failed = True
            _remove(partial)
            left = list_checkpoints(final.parent.parent)
            kept = f"the newest is {left[0].name}" if left else "there is none yet"
            rank_zero_warn(
                f"the checkpoint at step {step_of(final)} could not be written to {final.parent} "
                f"({error.strerror or error}): free some space; earlier checkpoints are kept, {kept}"
            )
        except Exception as error:
            self._error = error

    def _rotate(self, newest: Path) -> None:
        folder, step = newest.parent, step_of(newest)
        found = sorted(folder.glob("step_*.ckpt"), key=step_of)
        ahead = [p for p in found if step_of(p) > step]
        for path in [p for p in found if p not in ahead][: -self.keep]:
            if not (self.keep_every_n_steps and step_of(path) % self.keep_every_n_steps == 0):
                _remove(path)
                checksum_file(path).unlink(missing_ok=True)
        for path in ahead:  # from an earlier attempt, or damaged: a resume must not take them for the newest
            (folder / "stale").mkdir(exist_ok=True)
            for part in (path, checksum_file(path)):
                if part.exists():
                    _remove(folder / "stale" / part.name)
                    part.rename(folder / "stale" / part.name)
            rank_zero_warn(f"moved {path.name}, which lies after step {step}, to {folder / 'stale'}")

    # -- signals

    def _listen(self, trainer: Trainer) -> None:
        # Lightning sets its own handlers after `setup` and puts the earlier ones back when it ends
        requeue = getattr(_cluster(trainer), "requeue_signal", None) or signal.SIGUSR1
        self._signal, self._process = 0, os.getpid()
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, requeue}:
            try:
                self._replaced[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread, where Python allows no handlers
                return

    def _stop_listening(self) -> None:
        for number, handler in self._replaced.items():
            with suppress(ValueError, TypeError):
                signal.signal(number, handler)
        self._replaced = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # a data loader's worker, which inherited this handler: it goes on until the step is done or told twice
            if number == signal.SIGTERM and self._signal:
                os._exit(128 + number)
            self._signal = number
            return
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        again = " (again to stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again}\n".encode())

    def _leave(self, trainer: Trainer, received: int) -> None:
        name = signal.Signals(received).name
        if trainer.is_global_zero:
            run = Run(Path(trainer.default_root_dir))
            on = f"diffzoo fit --run {run.root} --resume auto" if run.config.is_file() else "--resume auto"
            print(f"\n{name}: stopped at step {trainer.global_step}; go on with: {on}", file=sys.stderr)
            if _requeues(trainer, received):
                _requeue()
        self._stop_listening()
        raise Preempted(128 + received)


def _cluster(trainer: Trainer) -> ClusterEnvironment | None:
    """What launched the processes; the single-device strategy does not know it."""
    return trainer._accelerator_connector.cluster_environment


def _requeues(trainer: Trainer, received: int) -> bool:
    environment = _cluster(trainer)
    return (
        isinstance(environment, SLURMEnvironment)
        and environment.auto_requeue
        and received == (environment.requeue_signal or signal.SIGUSR1)
    )


def _requeue() -> None:
    """Requeue this SLURM job as Lightning does, but after the step and without a checkpoint of Lightning's."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"the job {job} could not be put back into the queue ({error}): submit it again")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing, and checksums without a checkpoint."""
    for path in folder.glob(".step_*.part"):
        _remove(path)
    for path in folder.glob("step_*.ckpt.sha256"):
        if not path.with_name(path.name.removesuffix(".sha256")).exists():
            path.unlink()


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
