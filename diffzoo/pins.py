"""What is recorded on the first download is compared ever after, where nobody states a revision or a hash.

    $HF_HOME/diffzoo/<name.tag>/pin.json                 weights: sha256, size, revision, state_sha256, fingerprint
    $HF_HOME/diffzoo/<name.tag>/pin-<key>.json           a mirror's file: sha256, size, revision
    $HF_HOME/diffzoo/companions/<owner--name>.json       frozen encoders: revision, files: {name: sha256}

The Hub client's own note of a branch follows every download by any program, so it cannot serve as this record.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffzoo.cache import cache_dir, explain_disk, lock
from diffzoo.errors import UserError
from diffzoo.files import sha256, to_json, write_text
from diffzoo.hub import cached_revision, hub_file

__all__ = ["Record", "check_files", "encoder_record", "first_revision", "read_record", "record_first", "weights_record"]

Record = dict[str, Any]


def weights_record(name: str, mirror: str = "") -> Path:
    """Where the record of the published weights `name.tag` lies, or of a mirror's file, whether or not it is there."""
    key = f"-{hashlib.sha256(mirror.encode()).hexdigest()[:8]}" if mirror else ""
    return cache_dir() / name / f"pin{key}.json"


def encoder_record(repo: str) -> Path:
    """Where the record of a frozen encoder's repository lies, whether or not it is there yet."""
    return cache_dir() / "companions" / f"{repo.replace('/', '--')}.json"


def read_record(path: Path) -> Record:
    """What was recorded; empty before the first download.

    Raises:
        UserError: if the record is damaged.
    """
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not re.fullmatch("[0-9a-f]{40}|", record.get("revision") or ""):
            raise ValueError
        return dict(record)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: delete it to record what is there anew") from None


def record_first(path: Path, found: Mapping[str, Any]) -> Record:
    """The record after fields that it lacks were added from `found`; what it has stays as it was first."""
    with lock(path):
        known = read_record(path)
        files = {**found.get("files", {}), **known.get("files", {})}
        record = {**found, **known, **({"files": files} if files else {})}
        if record != known:
            with explain_disk(path):
                write_text(path, to_json(record))
    return record


def first_revision(repo: str, file: str = "config.json", what: str = "") -> str:
    """The commit of a frozen encoder without a stated revision: recorded on first use, the same ever after.

    Args:
        repo: Hub repository.
        file: one that is needed anyway; its download tells the commit.
        what: the encoder's name in messages.

    Raises:
        UserError: if the record is damaged, or on first use whatever `hub_file` raises.
    """
    path = encoder_record(repo)
    known: str | None = read_record(path).get("revision")
    if known is None:
        # what is in the cache was in use before there was a record
        _, commit = hub_file(repo, file, cached_revision(repo, file), what)
        known = str(record_first(path, {"revision": commit})["revision"])
        warnings.warn(
            f"{repo} is unpinned (no revision is stated): recorded on first download as revision {known}, "
            "compared ever after",
            stacklevel=2,
        )
    return known


def check_files(repo: str, files: Mapping[str, Path]) -> None:
    """Compare the hashes of an encoder's files with those recorded on first use; new ones are recorded.

    Args:
        repo: Hub repository, of which `first_revision` has a record.
        files: paths by their names in the repository.

    Raises:
        UserError: if a file is another one.
    """
    path = encoder_record(repo)
    hashes = {name: sha256(file) for name, file in files.items()}
    first = record_first(path, {"files": hashes})["files"]
    for name, value in hashes.items():
        if value != first[name]:
            raise UserError(
                f"{name} of {repo} is not the file that was recorded on first download: expected sha256 "
                f"{first[name]}, got {value}: delete {files[name].resolve()} to fetch it again, or {path} to accept "
                "another"
            )
