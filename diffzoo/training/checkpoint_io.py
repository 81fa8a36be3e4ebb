"""Writing a checkpoint while training goes on.

The state is set aside at the end of a step and written afterwards:

    on a device    it is copied to the host, and the thread that waits for the file writes the copy;
    on the host    a forked child writes the memory as it was at the fork. The system copies the pages that training
                   changes before they are written, and no others: forward and backward passes change none of them,
                   so the next optimizer step waits for the child, but not for long (`checkpoint_files.PATIENCE`);
    elsewhere      (a system without fork) it is written at once.

A checkpoint goes straight to its file and is hashed on the way; Lightning's own way builds it in memory first.
"""

import errno
import gc
import hashlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

from diffzoo.errors import causes

__all__ = ["BackgroundCheckpointIO"]


class _HashingFile:
    """A file that is hashed as it is written; a child process stops writing once its parent is gone."""

    def __init__(self, file: IO[bytes], parent: int | None = None):
        self._file, self._hash, self._parent = file, hashlib.sha256(), parent

    def write(self, data: bytes) -> int:
        if self._parent is not None and os.getppid() != self._parent:
            os._exit(1)
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write(checkpoint: Mapping[str, object], path: Path, parent: int | None = None) -> str:
    """Write and flush a checkpoint; its SHA-256.

    Raises:
        OSError: if the disk is full or fails; the file is gone then.
    """
    try:
        with open(path, "wb") as file:
            hashing = _HashingFile(file, parent)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        return hashing.hexdigest()
    except (OSError, RuntimeError) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        with suppress(OSError):
            path.unlink()
        raise cause from error


def _disk_error(error: BaseException) -> OSError | None:
    """The disk error behind an exception: torch's writer wraps it, or reports a short write itself."""
    text = str(error)
    short = "PytorchStreamWriter" in text or "unexpected pos" in text
    own = OSError(errno.EIO, text.splitlines()[0]) if short else None
    return next((e for e in causes(error) if isinstance(e, OSError)), own)


class _Child:
    """A forked child writes it, and answers through a pipe.

    Raises:
        OSError: if the system refuses the fork.
    """

    def __init__(self, write: Callable[[], str]):
        self._pipe, theirs = os.pipe()
        try:
            with warnings.catch_warnings():  # of forks beside threads; the child computes nothing
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
        except OSError:
            os.close(self._pipe)
            os.close(theirs)
            raise
        if self._pid == 0:
            self._serve(write, theirs)
        os.close(theirs)

    @staticmethod
    def _serve(write: Callable[[], str], pipe: int) -> None:
        """Write, answer and exit: all that the child does."""
        try:
            gc.disable()  # the child must not finalise the parent's garbage
            with suppress(ValueError):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
            try:
                answer = {"digest": write()}
            except OSError as error:
                answer = {"errno": str(error.errno or errno.EIO), "text": error.strerror or str(error)}
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            os.write(pipe, json.dumps(answer).encode())
        finally:
            os._exit(0)

    def result(self) -> str:
        with os.fdopen(self._pipe, "rb") as file:
            text = file.read()
        os.waitpid(self._pid, 0)
        if not text:
            raise OSError(errno.EIO, "the process that wrote it was killed")
        answer: dict[str, str] = json.loads(text)
        if "failed" in answer:
            raise RuntimeError(f"the checkpoint cannot be written: {answer['failed']}")
        if "errno" in answer:
            raise OSError(int(answer["errno"]), answer["text"])
        return str(answer["digest"])


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Sets the state aside and lets training go on; `finish` waits for the file.

    A full or failing disk does not raise where training saves, because the other processes are already on their way to
    a barrier: `finish` raises it.
    """

    def __init__(self) -> None:
        self._unfinished: Callable[[], str] | None = None
        self.shares_memory = False  # whether what is being written is the memory that training changes

    def save_checkpoint(
        self, checkpoint: Mapping[str, object], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Set the state aside; `finish` must be called before the next one."""
        place, parent = Path(path), os.getpid()
        self.shares_memory = False
        with suppress(OSError):  # opening the file will fail with the same error
            place.parent.mkdir(parents=True, exist_ok=True)
        if tree_any(lambda leaf: isinstance(leaf, Tensor) and leaf.device.type != "cpu", checkpoint):
            copied = on_host(checkpoint)
            self._unfinished = lambda: _write(copied, place)
            return
        if sys.platform == "linux":
            with suppress(OSError):  # the system may refuse to reserve that much memory
                self._unfinished = _Child(lambda: _write(checkpoint, place, parent)).result
                self.shares_memory = True
                return
        written = Future[str]()
        try:
            written.set_result(_write(checkpoint, place))
        except OSError as error:
            written.set_exception(error)
        self._unfinished = written.result

    def finish(self) -> str:
        """Wait until the checkpoint is written; its SHA-256, or "" where this process wrote none.

        Raises:
            OSError: if the disk is full or fails.
        """
        unfinished, self._unfinished = self._unfinished, None
        return unfinished() if unfinished is not None else ""


def on_host(checkpoint: Mapping[str, object]) -> Mapping[str, object]:
    """A copy of a checkpoint whose tensors lie on the host; those that share their memory still do."""
    copies: dict[tuple[object, ...], Tensor] = {}

    def copied(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        key = (leaf.device, leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride())
        if key not in copies or not leaf.numel():
            copies[key] = leaf.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map(copied, checkpoint)
