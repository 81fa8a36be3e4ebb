"""The files of a run's checkpoints: written under a temporary name, checksummed, renamed, rotated.

A checkpoint is flushed and renamed when it is whole, so that a process killed at any moment leaves the earlier ones
untouched. Its checksum file (`diffzoo.runs`) is written before the rename. Training goes on meanwhile
(`checkpoint_io.py`).
"""

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffzoo.files import write_text
from diffzoo.runs import checksum_file, checksum_lines, list_checkpoints, step_of
from diffzoo.training.checkpoint_io import BackgroundCheckpointIO

__all__ = ["CheckpointFiles", "remove_leftovers"]

PATIENCE = 2.0  # seconds that an optimizer step waits for a checkpoint that shares memory with it


class CheckpointFiles:
    """Writes one checkpoint at a time and keeps the newest few.

    Args:
        keep, keep_every_n_steps: as for `Checkpointing`.
    """

    def __init__(self, keep: int, keep_every_n_steps: int):
        self.keep, self.keep_every_n_steps = keep, keep_every_n_steps
        self._io: BackgroundCheckpointIO | None = None
        self._finishing: threading.Thread | None = None  # of the checkpoint that is being written
        self._sharing: threading.Thread | None = None  # the same, until an optimizer step has waited for it
        self._failed = False  # whether the disk failed at the last one
        self._error: Exception | None = None

    def is_permanent(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept for ever."""
        return self.keep_every_n_steps > 0 and step % self.keep_every_n_steps == 0

    def attach(self, trainer: Trainer) -> None:
        """Let a trainer write its checkpoints in the background."""
        if self._io is None:
            self._io = BackgroundCheckpointIO()
            with suppress(NotImplementedError, AttributeError):  # strategies that write shards by themselves
                trainer.strategy.checkpoint_io = self._io

    def write(self, trainer: Trainer, final: Path, wait: bool) -> bool:
        """Write a checkpoint; every process must call it. Returns False if the disk is known to have failed.

        Without `wait`, training goes on while the file is written, and a failure is reported when it is known.
        """
        self.wait()
        partial = final.with_name(f".{final.name}.part")
        trainer.save_checkpoint(partial, weights_only=False)
        self._failed = False
        if trainer.is_global_zero:
            self._finishing = threading.Thread(target=self._finish, args=(partial, final), daemon=True)
            self._finishing.start()
            self._sharing = self._finishing if self._io is not None and self._io.shares_memory else None
        if wait or partial.is_dir():  # shards are written already
            self.wait()
        trainer.strategy.barrier("diffzoo.checkpoints")
        return not self._failed

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; raises what went wrong, except for disk errors."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait_before_step(self) -> None:
        """Wait a little before an optimizer step, once for each checkpoint.

        The step changes all memory that a forked child has not written yet, and the system would keep it twice.
        """
        writer, self._sharing = self._sharing, None
        if writer is not None:
            writer.join(PATIENCE)

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
            if not self.is_permanent(step_of(path)):
                _remove(path)
                checksum_file(path).unlink(missing_ok=True)
        for path in ahead:  # from an earlier attempt, or damaged: a resume must not take them for the newest
            (folder / "stale").mkdir(exist_ok=True)
            for part in (path, checksum_file(path)):
                if part.exists():
                    _remove(folder / "stale" / part.name)
                    part.rename(folder / "stale" / part.name)
            rank_zero_warn(f"moved {path.name}, which lies after step {step}, to {folder / 'stale'}")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing, and checksums without a checkpoint."""
    for path in folder.glob(".step_*.part"):
        _remove(path)
    for path in folder.glob("step_*.ckpt.sha256"):
        if not path.with_name(path.name.removesuffix(".sha256")).exists():
            path.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
