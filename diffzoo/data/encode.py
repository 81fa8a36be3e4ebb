"""Encode a source into a cache of latents; see `latents` for what is written.

The work is cut into shards. A process claims a shard by locking a file, which the system unlocks when the process
dies, and renames the shard into place when it is whole; so several processes share the work, and a killed one loses
at most one shard.
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffzoo.data.latents import PASSPORT, Passport, shard_name
from diffzoo.data.sources import Record, Source
from diffzoo.data.stream import BadImage, Transform
from diffzoo.data.transforms import to_images
from diffzoo.errors import UserError
from diffzoo.files import atomic_path, write_text

__all__ = ["Progress", "encode", "make_passport"]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Progress:
    """What one process did.

    Args:
        encoded: shards that this process wrote.
        present: shards that were there.
        elsewhere: shards that other processes are writing.
        bad: pictures that could not be decoded, by row.
    """

    encoded: int
    present: int
    elsewhere: int
    bad: dict[int, str]


def make_passport(source: Source, transform: Transform, flips: int, autoencoder: Any, shard_rows: int) -> Passport:
    """The passport of a cache of `source`; `autoencoder` has `id` and `hash`."""
    return Passport(
        source.name,
        source.revision,
        source.fingerprint,
        transform.image_size,
        transform.resize,
        flips,
        autoencoder.id,
        autoencoder.hash,
        len(source),
        shard_rows,
        tuple(source.class_names),
        source.has_captions,
        source.licence,
    )


def encode(
    source: Source,
    folder: Path,
    transform: Transform,
    encoder: Encode,
    passport: Passport,
    batch_size: int = 16,
    max_bad: int = 100,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Progress:
    """Write the shards that are missing, as far as no other process is writing them.

    Args:
        source: the rows.
        folder: of this part of the cache.
        transform: centre crop and size; flips are encoded both.
        encoder: images `(b, 3, h, w)` in [-1, 1] to (mean, standard deviation), each `(b, c, h', w')`.
        passport: from `make_passport`.
        batch_size: images at a time.
        max_bad: how many pictures may be left out because they cannot be decoded.
        report: called with (shards done, shards) after each shard.

    Raises:
        UserError: the folder holds latents of something else, or too many pictures are bad.
    """
    _check_folder(folder, passport)
    progress = Progress(0, 0, 0, {})
    for shard in range(passport.shards):
        path = folder / shard_name(shard)
        with _claim(folder, shard) as mine:
            if path.is_file():
                progress.present += 1
            elif not mine:
                progress.elsewhere += 1
            else:
                rows = range(shard * passport.shard_rows, min(len(source), (shard + 1) * passport.shard_rows))
                _write_shard(source, rows, path, transform, encoder, passport.flips, batch_size, progress.bad)
                progress.encoded += 1
                _check_bad(progress.bad, max_bad)
        report(shard + 1, passport.shards)
    return progress


def _check_folder(folder: Path, passport: Passport) -> None:
    if not (folder / PASSPORT).is_file():
        write_text(folder / PASSPORT, passport.to_json())
    differences = Passport.read(folder).differences(passport)
    if differences:
        raise UserError(
            f"{str(folder)!r} holds latents of something else ({'; '.join(differences)}): give another folder"
        )


def _check_bad(bad: dict[int, str], max_bad: int) -> None:
    if len(bad) > max_bad:
        raise UserError(
            f"{len(bad)} pictures cannot be decoded, more than max_bad = {max_bad} allows; "
            f"the last is {list(bad.values())[-1]}"
        )


@contextlib.contextmanager
def _claim(folder: Path, shard: int) -> Iterator[bool]:
    """Whether this process alone may write the shard; the claim ends with the process."""
    path = folder / f".claim-{shard:05d}"
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        with contextlib.suppress(OSError):
            path.unlink()


def _good_rows(
    source: Source, rows: range, transform: Transform, bad: dict[int, str]
) -> Iterator[tuple[int, Record, Any]]:
    """(row, record, pixels) of the rows that can be decoded; blocks are read once."""
    block, records = -1, None
    for row in rows:
        try:
            if source.random_access:
                record = source.read_row(row)
            else:
                wanted, within = source.locate(row)
                if wanted != block:
                    block, records = wanted, source.read_block(wanted)
                assert records is not None
                record = records[within]
            yield row, record, transform.pixels(record, ())
        except BadImage as error:
            bad[row] = str(error)


@torch.no_grad()
def _write_shard(
    source: Source,
    rows: range,
    path: Path,
    transform: Transform,
    encoder: Encode,
    flips: int,
    batch_size: int,
    bad: dict[int, str],
) -> None:
    from safetensors.numpy import save_file

    good = list(_good_rows(source, rows, transform.held_out(), bad))
    parts: list[np.ndarray[Any, Any]] = []
    for first in range(0, len(good), batch_size):
        pixels = torch.from_numpy(np.stack([p for _, _, p in good[first : first + batch_size]]))
        views = [pixels, pixels.flip(-1)][:flips]
        moments = [torch.cat(encoder(to_images(view)), dim=1) for view in views]
        parts.append(torch.stack(moments, dim=1).to("cpu", torch.float16).numpy())
    if not parts:
        raise UserError(f"none of the rows {rows.start} to {rows.stop - 1} of {source.name} can be decoded")
    tensors = {
        "moments": np.ascontiguousarray(np.concatenate(parts)),  # safetensors writes memory as it lies
        "row": np.array([row for row, _, _ in good], dtype=np.int64),
        "label": np.array([-1 if r.label is None else r.label for _, r, _ in good], dtype=np.int64),
    }
    captions = json.dumps([list(r.captions) for _, r, _ in good])
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"captions": captions})
