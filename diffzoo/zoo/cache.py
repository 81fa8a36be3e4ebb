"""The cache of published weights.

    $HF_HOME/diffzoo/<name.tag>/original/<file>    what was downloaded, when the Hub's own cache does not hold it
    $HF_HOME/diffzoo/<name.tag>/pin.json           hash, size and revision recorded on the first download
    $HF_HOME/diffzoo/<name.tag>/<key>.safetensors  the converted weights

Every file is written under a temporary name and renamed; work on one entry is done under a lock, so that any number
of processes may load at once.
"""

import json
from pathlib import Path
from typing import Any

from diffzoo.errors import UserError
from diffzoo.files import sha256, to_json, write_text
from diffzoo.hub import cache_dir, explain_disk, lock

__all__ = ["entry_dir", "lock", "read_pin", "sha256", "to_json", "write_pin"]


def entry_dir(name: str) -> Path:
    """The folder of one set of weights, made if needed."""
    path = cache_dir() / name
    with explain_disk(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


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
