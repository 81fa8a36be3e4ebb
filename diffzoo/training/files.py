"""Files that are whole or absent: written beside their final name, flushed to the disk, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_path", "flush"]


def flush(path: str | os.PathLike[str]) -> None:
    """Have the operating system write a file's (or a folder's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` if the block succeeds and vanishes if it does not.

    The name holds the process id, so that two processes cannot write to one temporary file.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
        flush(final.parent)  # the rename itself is on the disk only after the folder is
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
