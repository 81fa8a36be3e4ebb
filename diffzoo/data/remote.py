"""Reads that may fail for a moment, and the folder of cached indices."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from diffzoo.cache import cache_dir
from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.hub import LOG_IN

__all__ = ["ACCEPT", "file_system", "hub_file_of", "index_folder", "kept", "retried", "revision_of"]

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Value = TypeVar("Value")

RETRIES = 5
BACK_OFF = 1.0  # seconds before the first retry; doubled each time
LONGEST_WAIT = 300.0  # seconds; the Hub counts requests over five minutes
LOST = ("Timeout", "ConnectError", "ReadError", "RemoteProtocolError", "ConnectionError", "NetworkError")
ACCEPT = f"accept its conditions on its page on the Hub, then {LOG_IN}"


def index_folder() -> Path:
    """Where indices of published files are kept."""
    return cache_dir() / "index"


def kept(name: str | None, make: Callable[[], Value]) -> Value:
    """`make()` as plain data, kept in the index folder under a name; without a name it is made each time."""
    path = index_folder() / f"{name}.json"
    if name is not None and path.is_file():
        known: Value = json.loads(path.read_text(encoding="utf-8"))
        return known
    value = make()
    if name is not None:
        with contextlib.suppress(TypeError):  # values that JSON does not know are read each time
            write_text(path, json.dumps(value))
    return value


def retried(
    what: str, action: Callable[[], Value], again: Callable[[], None] | None = None, remote: bool = True
) -> Value:
    """`action()`, repeated with back-off while the server or the network fails.

    Args:
        what: what is read, for the message.
        action: reads it.
        again: called before each repetition, such as to close a broken connection.
        remote: False for what lies on this disk, where waiting helps nothing: one attempt, and its error as it is.

    Raises:
        UserError: it still fails after the last retry, or the server refuses the user.
        Exception: the failure is not of a kind that passes.
    """
    if not remote:
        return action()
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:
            if _status(error) in (401, 403):
                raise _refused(what, error) from error
            if not _passes(error):
                raise
            if attempt == RETRIES:
                raise UserError(
                    f"could not read {what} in {RETRIES + 1} attempts ({_short(error)}): run again when the server "
                    "answers; a training run goes on exactly from its last checkpoint"
                ) from error
            wait = max(BACK_OFF * 2**attempt, min(_retry_after(error), LONGEST_WAIT))
        attempt += 1
        time.sleep(wait)
        if again is not None:
            again()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error; the Hub's file system calls a refusal a file that is not there."""
    if type(error) is FileNotFoundError and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else int(status)


def _refused(what: str, error: BaseException) -> UserError:
    repo = re.match(r"(?:hf://)?datasets/([^/@]+(?:/[^/@]+)?)", what)
    name = f"the data set {repo[1]}" if repo else what
    return UserError(
        f"the server refused to give {name} ({_status(error)}), which is gated or private, or the token has expired: "
        f"{ACCEPT}; a training run goes on exactly from its last checkpoint"
    )


def _retry_after(error: BaseException) -> float:
    """The seconds that the server asks to wait; 0 if it does not say."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _passes(error: BaseException) -> bool:
    """Whether a failure may be over a moment later: 408, 429, 5xx, time-outs, lost connections."""
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | UserError):
        return False
    if "Couldn't reach" in str(error):  # the client of `datasets` has tried again already
        return False
    return isinstance(error, OSError) or any(word in type(error).__name__ for word in LOST)


def file_system(path: str, fresh: bool = False) -> tuple["AbstractFileSystem", bool]:
    """(fsspec file system, whether it is remote) of a path or URL; with `fresh`, one that shares no open file."""
    import fsspec

    system, _ = fsspec.core.url_to_fs(path, **({"skip_instance_cache": True} if fresh else {}))
    if path.startswith("zip://"):
        return system, file_system(path.partition("::")[2])[1]
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    return system, protocol not in ("file", "local", "memory")


def hub_file_of(path: str) -> tuple[str, str, str] | None:
    """(repository, revision, path inside it) of `hf://datasets/owner/name@revision/path`; None for anything else."""
    match = re.match(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@([^/]+)/(.+)", path)
    return (match[1], match[2], match[3]) if match else None


def revision_of(path: str) -> str:
    """The commit in `hf://datasets/owner/name@<commit>/file`, or ""."""
    found = hub_file_of(path)
    return found[1] if found and re.fullmatch("[0-9a-f]{40}", found[1]) else ""
