"""Files that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "sha256", "to_json", "write_text"]

HOST = re.sub(r"[^\w-]", "", platform.node())[:20]
ABANDONED = 86_400.0  # seconds without a byte, after which nobody on another machine is writing any more


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name near `path` that is renamed to it on success and removed on failure.

    Folders are made. The data is flushed to disk before the rename, so that a crash leaves the old file or the new.
    What a killed process left of the same file is removed.
    """
    path = Path(path)
    # a folder of its own takes the temporary files that writers make in turn, and can be looked through at once
    drafts = path.with_name(f".{path.name}.part")
    _remove_abandoned(drafts)
    own = _make_own(drafts)
    try:
        temporary = own / "draft"
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are writing the same file
            drafts.rmdir()


def _make_own(drafts: Path, attempts: int = 10) -> Path:
    """A folder in `drafts` that says whose it is."""
    for attempt in range(attempts):
        with contextlib.suppress(*((FileNotFoundError,) if attempt < attempts - 1 else ())):
            # another writer may remove `drafts` in between
            drafts.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f"{HOST}.{os.getpid()}.", dir=drafts))
    raise AssertionError("unreachable")


def _remove_abandoned(drafts: Path) -> None:
    found: list[Path] = []
    with contextlib.suppress(OSError):  # most often there is none
        found = list(drafts.iterdir())
    for draft in found:
        with contextlib.suppress(OSError):
            host, _, rest = draft.name.partition(".")
            pid = rest.partition(".")[0]
            age = time.time() - max(p.stat().st_mtime for p in (draft, *draft.iterdir()))
            if age > ABANDONED or (host == HOST and pid.isdigit() and not _runs(int(pid))):
                shutil.rmtree(draft, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name != "posix":  # where signal 0 is a real one
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(data: Any) -> str:
    """Plain data as text, in one form only: sorted keys, two spaces, a final newline."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
