"""Files that are there whole or not at all, and files that are something else than their name says."""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HEAD", "STRANGERS", "atomic_path", "kind_of", "sha256", "to_json", "what_is", "write_text"]

Kinds = tuple[tuple[bytes, str, str], ...]

# what stands where a download was expected: its first bytes, its name, and what to do about it
STRANGERS: Kinds = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch that with `git lfs pull`"),
    (
        rb"\s*<(!doctype|html|head|\?xml)",
        "a web page",
        "download the file itself, not the page that shows it: on the Hub its address has /resolve/ for /blob/",
    ),
)
_GZIP: Kinds = ((rb"\x1f\x8b", "compressed", "unpack it"),)
HEAD = 512  # bytes that say what a file is


def kind_of(head: bytes, kinds: Kinds = STRANGERS + _GZIP) -> tuple[str, str]:
    """(what a file is, what to do about it) by its first bytes; two empty texts for other files."""
    return next(((k, a) for p, k, a in kinds if re.match(p, head, re.DOTALL | re.IGNORECASE)), ("", ""))


def what_is(head: bytes, otherwise: str) -> str:
    """What a file is and what to do about it, by its first bytes; `otherwise` for other files."""
    return ": ".join(filter(None, kind_of(head))) or otherwise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success and removed on failure.

    Folders are made. The data is flushed to disk before the rename, so that a crash leaves the old file or the new;
    a killed process may leave its `.NAME.*.part`, which nobody reads.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(data: object) -> str:
    """Plain data as text, in one form only: sorted keys, two spaces, a final newline."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
