"""Reading that may fail for a moment, and where indices are kept."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffzoo.errors import UserError
from diffzoo.hub import cache_dir

__all__ = ["file_system", "index_folder", "retried", "revision_of"]

Value = TypeVar("Value")

RETRIES = 5
BACK_OFF = 1.0  # seconds before the first retry; doubled each time
LOST = ("Timeout", "ConnectError", "ReadError", "RemoteProtocolError", "ConnectionError", "NetworkError")


def index_folder() -> Path:
    """Where indices of published files are kept."""
    return cache_dir() / "index"


def retried(what: str, action: Callable[[], Value], again: Callable[[], None] | None = None) -> Value:
    """`action()`, repeated with back-off while the server or the network fails.

    Args:
        what: what is read, for the message.
        action: reads it.
        again: called before each repetition, such as to close a broken connection.

    Raises:
        UserError: it still fails after the last retry.
        Exception: the failure is not of a kind that passes.
    """
    for attempt in range(RETRIES + 1):
        try:
            return action()
        except Exception as error:
            if not _passes(error):
                raise
            if attempt == RETRIES:
                raise UserError(
                    f"could not read {what} in {RETRIES + 1} attempts ({_short(error)}): run again when the server "
                    "answers; a training run goes on exactly from its last checkpoint"
                ) from error
        time.sleep(BACK_OFF * 2**attempt)
        if again is not None:
            again()
    raise AssertionError("unreachable")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _passes(error: BaseException) -> bool:
    """Whether a failure may be over a moment later: 408, 429, 5xx, time-outs, lost connections."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | UserError):
        return False
    if "Couldn't reach" in str(error):  # the client of `datasets` has tried again already
        return False
    return isinstance(error, OSError) or any(word in type(error).__name__ for word in LOST)


def file_system(path: str) -> tuple[Any, bool]:
    """(fsspec file system, whether it is remote) of a path or URL."""
    import fsspec

    system, _ = fsspec.core.url_to_fs(path)
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    return system, protocol not in ("file", "local", "memory")


def revision_of(path: str) -> str:
    """The commit in `hf://datasets/owner/name@<commit>/file`, or ""."""
    match = re.match(r"hf://datasets/[^/]+/[^/@]+@([0-9a-f]{40})/", path)
    return match[1] if match else ""
