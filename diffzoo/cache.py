"""The cache on disk: where it is, its locks, the room it has, and what goes wrong there as one sentence each.

The Hub's client reads its environment variables when it is imported; here they are read at each call, so that a
program may set them later.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffzoo.errors import UserError

__all__ = ["cache_dir", "explain_disk", "free_space_for", "gigabytes", "hub_cache_dir", "lock", "system_error"]


def _hf_home() -> Path:
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"


def _only_hub_cache() -> bool:
    return bool(os.environ.get("HF_HUB_CACHE")) and not os.environ.get("HF_HOME")


def cache_dir() -> Path:
    """The folder of converted weights and records: `$HF_HOME/diffzoo`, or in `$HF_HUB_CACHE` if that alone is set."""
    # a user who moved only the client's cache moved it to the disk that has the room
    return (hub_cache_dir() if _only_hub_cache() else _hf_home()) / "diffzoo"


def hub_cache_dir() -> Path:
    """The Hub client's own cache."""
    path = os.environ.get("HF_HUB_CACHE")
    return Path(path).expanduser() if path else _hf_home() / "hub"


@contextlib.contextmanager
def lock(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock beside `path`, whose folder is made; other processes wait.

    Raises:
        filelock.Timeout: if another process holds it for `timeout` seconds.
    """
    from huggingface_hub.utils import WeakFileLock

    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(path.name + ".lock"), timeout=timeout):
        yield


def gigabytes(size: float) -> str:
    """A number of bytes for people: "2.02 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


@contextlib.contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence that names it."""
    try:
        yield
    except Exception as error:
        number = system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = f"{gigabytes(shutil.disk_usage(_existing(path)).free)} free"
            raise UserError(
                f"the disk is full while writing {path} ({free}): make room, or {_move(path, 'another disk')}"
            ) from error
        if number == errno.EFBIG:
            raise UserError(f"cannot write {path}: a file this large is not allowed here: {_move(path)}") from error
        if number in (errno.EACCES, errno.EROFS):
            raise UserError(f"cannot write {path}: {_move(path)}") from error
        raise


def system_error(error: BaseException) -> int | None:
    """The number of the operating system's error, None for any other; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found.group(1)) if found else None


def _move(path: Path, where: str = "a folder you may write to") -> str:
    """What to do about a place that cannot take a file: only the cache is moved by a variable."""
    ours = [folder.absolute() for folder in (cache_dir(), hub_cache_dir())]
    if not any(folder in (path.absolute(), *path.absolute().parents) for folder in ours):
        return f"choose {where}"
    return f"point {'HF_HUB_CACHE' if _only_hub_cache() else 'HF_HOME'} to {where}"


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def free_space_for(size: int | None, path: Path) -> None:
    """Refuse before a download starts when `size` bytes cannot fit beside `path`."""
    free = shutil.disk_usage(_existing(path)).free
    if size is not None and size > free:
        raise UserError(
            f"the disk is too full for {path.name}: it needs {gigabytes(size)} and {gigabytes(free)} are free at "
            f"{path.parent}: make room, or {_move(path, 'another disk')}"
        )
