"""The first revision of a companion is its revision for ever, where nobody states one.

    $HF_HOME/diffzoo/companions/<owner--name>.json    {revision, files: {name: sha256 of a file of weights}}

The Hub client's own note of a branch follows every download by any program, so it cannot serve as this record.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffzoo.errors import UserError
from diffzoo.files import sha256, to_json, write_text
from diffzoo.hub import cache_dir, cached_revision, explain_disk, hub_file, lock

__all__ = ["check_weights", "first_revision", "recorded_revision"]


def _pin_path(repo: str) -> Path:
    return cache_dir() / "companions" / f"{repo.replace('/', '--')}.json"


def _read(repo: str) -> dict[str, Any]:
    path = _pin_path(repo)
    if not path.is_file():
        return {}
    try:
        pin = json.loads(path.read_text(encoding="utf-8"))
        if not re.fullmatch("[0-9a-f]{40}", pin["revision"]) or not isinstance(pin["files"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it to record the revision of {repo} anew") from None
    return dict(pin)


def _write(repo: str, pin: Mapping[str, Any]) -> None:
    path = _pin_path(repo)
    with explain_disk(path):
        write_text(path, to_json(pin))


def recorded_revision(repo: str) -> str | None:
    """The commit that was recorded on first use, None before that."""
    return _read(repo).get("revision")


def first_revision(repo: str, file: str = "config.json", what: str = "") -> str:
    """The commit of a companion without a stated revision: recorded on first use, the same ever after.

    Args:
        repo: Hub repository.
        file: one that is needed anyway, which tells the commit.
        what: the companion's name in messages.

    Raises:
        UserError: if the record is damaged, or on first use whatever `hub_file` raises.
    """
    known = recorded_revision(repo)
    if known is None:
        with lock(_pin_path(repo)):
            known = recorded_revision(repo)
            if known is None:
                # what is in the cache was in use before there was a record
                _, known = hub_file(repo, file, cached_revision(repo, file), what)
                _write(repo, {"revision": known, "files": {}})
                warnings.warn(
                    f"{repo} is unpinned (no revision is stated): recorded on first download as revision {known}, "
                    "compared ever after",
                    stacklevel=2,
                )
    return known


def check_weights(repo: str, files: Mapping[str, Path]) -> None:
    """Compare the hashes of a companion's weights with those recorded on first use; records those that are new.

    Args:
        repo: Hub repository, of which `first_revision` has a record.
        files: paths by their names in the repository.

    Raises:
        UserError: if a file is another one.
    """
    hashes = {name: sha256(path) for name, path in files.items()}
    with lock(_pin_path(repo)):
        pin = _read(repo)
        for name, value in hashes.items():
            expected = pin["files"].get(name, value)
            if value != expected:
                raise UserError(
                    f"{name} of {repo} is not the file that was recorded on first download: expected sha256 "
                    f"{expected}, got {value}: delete {files[name].resolve()} to fetch it again, or "
                    f"{_pin_path(repo)} to accept another"
                )
        if not hashes.keys() <= pin["files"].keys():
            _write(repo, {**pin, "files": {**pin["files"], **hashes}})
