"""The cache of published weights.

    $HF_HOME/diffzoo/<name.tag>/original/<file>    what was downloaded, when the Hub's own cache does not hold it
    $HF_HOME/diffzoo/<name.tag>/pin.json           hash, size and revision recorded on the first download
    $HF_HOME/diffzoo/<name.tag>/<key>.safetensors  the converted weights

Every file is written under a temporary name and renamed; work on one entry is done under a lock, so that any number
of processes may load at once.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.hub import cache_dir, explain_disk

__all__ = ["entry_dir", "lock", "read_pin", "sha256", "to_json", "write_pin"]


def entry_dir(name: str) -> Path:
    """The folder of one set of weights, made if needed."""
    path = cache_dir() / name
    with explain_disk(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; other processes wait."""
    from huggingface_hub.utils import WeakFileLock

    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(path.name + ".lock")):
        yield


def to_json(data: Any) -> str:
    """Plain data as text, in one form only: sorted keys, two spaces, a final newline."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_pin(name: str) -> dict[str, Any] | None:
    """What was recorded on the first download of `name`: sha256, size, revision."""
    path = cache_dir() / name / "pin.json"
    if not path.is_file():
        return None
    try:
        pin: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it to record the hash of {name} anew") from None
    return pin


def write_pin(name: str, pin: dict[str, Any]) -> None:
    """Record the hash, size and revision of `name`'s original file."""
    with explain_disk(cache_dir()):
        write_text(entry_dir(name) / "pin.json", to_json(pin))
