"""Signals that tell a run to stop: SIGTERM, SIGUSR1, Ctrl-C, and the one by which SLURM announces the end of a job.

A handler only takes note of them. The run acts at the end of its step, where `Checkpointing` asks.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffzoo.runs import Run

__all__ = ["Preempted", "StopSignals", "leave"]


class Preempted(SystemExit):
    """The run was told to stop and has saved its checkpoint; the exit status is 128 + the signal's number."""


class StopSignals:
    """Handlers of these signals. A second Ctrl-C interrupts at once.

    Attributes:
        received: number of the last signal; 0 = none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._replaced: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._process = os.getpid()

    @property
    def listening(self) -> bool:
        """Whether the handlers are set."""
        return bool(self._replaced)

    def listen(self, trainer: Trainer) -> None:
        """Set the handlers; when training starts, because Lightning sets its own after `setup`."""
        requeue = getattr(_cluster(trainer), "requeue_signal", None) or signal.SIGUSR1
        self.received, self._process = 0, os.getpid()
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, requeue}:
            try:
                self._replaced[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread, where Python allows no handlers
                return

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._replaced.items():
            with suppress(ValueError, TypeError):
                signal.signal(number, handler)
        self._replaced = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # a data loader's worker, which inherited this handler: it goes on until the step is done or told twice
            if number == signal.SIGTERM and self.received:
                os._exit(128 + number)
            self.received = number
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        again = " (again to stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again}\n".encode())


def leave(trainer: Trainer, received: int) -> NoReturn:
    """End a run that has saved its checkpoint; say how it goes on, and requeue its job where SLURM expects that."""
    if trainer.is_global_zero:
        run, name = Run(Path(trainer.default_root_dir)), signal.Signals(received).name
        on = f"diffzoo fit --run {run.root} --resume auto" if run.config.is_file() else "--resume auto"
        print(f"\n{name}: stopped at step {trainer.global_step}; go on with: {on}", file=sys.stderr)
        if _requeues(trainer, received):
            _requeue()
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
