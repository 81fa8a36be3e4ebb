"""Encode a source into a cache of latents; `latents` describes its files.

The work is cut into shards. A process claims a shard by locking a file, which the system unlocks when the process
dies, and renames the shard into place when it is whole; so several processes share the work, and a killed one loses
at most one shard of encoding. Workers decode the next images, and so the next shards are claimed, while the encoder
is at work. The process that finds every shard there completes the metadata.
"""

import contextlib
import fcntl
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from diffzoo.data.bad_images import check_bad
from diffzoo.data.batches import BatchMaker, RawBatch, Sample, Transform
from diffzoo.data.latents import (
    CACHE_METADATA,
    HEADER,
    CacheMetadata,
    header,
    open_shard,
    read_cache_metadata,
    shard_name,
)
from diffzoo.data.sources import Record, Source, ids_hash
from diffzoo.data.spans import Sequential
from diffzoo.data.workers import WorkerLoader
from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.images import to_float
from diffzoo.record import differences
from diffzoo.sizes import sides
from diffzoo.tensors import write_tensors

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = ["Progress", "encode", "make_cache_metadata"]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Encoder(Protocol):
    """What a cache is said to be made by: part of `diffzoo.encoders.Autoencoder`."""

    @property
    def id(self) -> str: ...

    @property
    def hash(self) -> str: ...


@dataclass
class Progress:
    """The work of one process: shards that it wrote, that were there, and that others are writing.

    `bad` are the images of the whole cache that could not be decoded, by row, as far as its shards are there.
    """

    encoded: int = 0
    present: int = 0
    elsewhere: int = 0
    bad: dict[int, str] = field(default_factory=dict)


def make_cache_metadata(
    source: Source, transform: Transform, flips: int, autoencoder: Encoder, shard_rows: int
) -> CacheMetadata:
    """The metadata of a cache of `source`."""
    rows = (source.name, source.revision, source.rows_hash)
    cropped = (transform.image_size, transform.resize, transform.fast_jpeg)
    said = (tuple(source.class_names), source.has_captions, source.licence)
    return CacheMetadata(*rows, *cropped, flips, autoencoder.id, autoencoder.hash, len(source), shard_rows, *said)


def encode(
    source: Source,
    folder: Path,
    transform: Transform,
    encoder: Encode,
    cache_metadata: CacheMetadata,
    batch_size: int = 16,
    max_bad: int = 100,
    report: Callable[[int, int], None] = lambda done, total: None,
    num_workers: int = 0,
) -> Progress:
    """Write the shards that are missing, as far as no other process is writing them.

    Args:
        source: the rows.
        folder: of this part of the cache.
        transform: centre crop and size; flips are encoded both.
        encoder: images `(b, 3, h, w)` in [-1, 1] to (mean, standard deviation), each `(b, c, h', w')`.
        cache_metadata: from `make_cache_metadata`.
        batch_size: images at a time.
        max_bad: how many images of the whole cache may be left out because they cannot be decoded.
        report: called with (shards done, shards) after each shard.
        num_workers: decoding processes; they change nothing of what is written.

    Raises:
        UserError: the folder holds latents of something else, or too many images are bad, or all are.
    """
    _check_folder(folder, cache_metadata)
    progress = Progress()
    for shard in cache_metadata.present(folder):
        progress.bad |= _bad_of(open_shard(folder, shard))
    check_bad(progress.bad, max_bad, source.name)
    work = _Work(source, folder, cache_metadata, batch_size, progress)
    make = _RowMaker(source, Sequential(source), transform.held_out(), "leave out", cache=False)
    loader, done = None, 0
    try:
        # blocks come whole: enough of them are under way with one per worker
        loader = WorkerLoader(make, work, num_workers, prefetch=4 if source.random_access else 1)
        for batch in loader:
            shard_work = work.claimed[0]
            shard_work.add(batch)
            if shard_work.take_up(encoder, batch_size):
                _write_shard(shard_work, folder, transform, encoder)
                work.claimed.popleft().claim.close()
                progress.encoded += 1
                progress.bad |= shard_work.bad
                check_bad(progress.bad, max_bad, source.name)
                done = progress.encoded + progress.present + progress.elsewhere
                report(done, cache_metadata.shards)
    finally:
        if loader is not None:
            loader.close()
        for shard_work in work.claimed:
            shard_work.claim.close()
    if done < cache_metadata.shards:
        report(cache_metadata.shards, cache_metadata.shards)
    if len(cache_metadata.present(folder)) == cache_metadata.shards:
        progress.present, progress.elsewhere = progress.present + progress.elsewhere, 0
        _complete(folder, cache_metadata, source, progress, max_bad)
    return progress


def _check_folder(folder: Path, cache_metadata: CacheMetadata) -> None:
    if not (folder / CACHE_METADATA).is_file():
        write_text(folder / CACHE_METADATA, cache_metadata.to_json())
    found = differences(vars(read_cache_metadata(folder).begun), vars(cache_metadata))
    if found:
        listed = "; ".join(f"{name}: {a!r}, {b!r}" for name, (a, b) in found.items())
        raise UserError(f"{str(folder)!r} holds latents of something else ({listed}): give another folder")


def _bad_of(shard: "safe_open") -> dict[int, str]:
    return {int(row): reason for row, reason in header(shard)["bad"].items()}


def _complete(folder: Path, cache_metadata: CacheMetadata, source: Source, progress: Progress, max_bad: int) -> None:
    """Add the number of images and the hash of their rows to the metadata, now that every shard is there."""
    shards = [open_shard(folder, k) for k in range(cache_metadata.shards)]
    for shard in shards:
        progress.bad |= _bad_of(shard)
    check_bad(progress.bad, max_bad, source.name)
    rows = np.concatenate([shard.get_tensor("row") for shard in shards])
    if not len(rows):
        raise UserError(f"none of the {len(source)} images of {source.name} can be decoded")
    complete = replace(cache_metadata, images=len(rows), ids=ids_hash(rows))
    if read_cache_metadata(folder) != complete:
        write_text(folder / CACHE_METADATA, complete.to_json())


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


class _RowMaker(BatchMaker):
    """Batches with all captions of each row."""

    ahead = False  # workers take blocks in turn: the one after is another's

    def collate(self, samples: Sequence[Sample], index: Sequence[int]) -> RawBatch:
        return {**super().collate(samples, index), "captions": [list(record.captions) for _, record, _ in samples]}

    def _one_caption(self, record: Record, row: int, visit: int) -> Record:
        return record


@dataclass
class _Shard:
    """A shard under way: its number, its rows in the source, and its claim, to be closed in the end."""

    index: int
    rows: range
    made: CacheMetadata
    claim: contextlib.ExitStack
    seen: int = 0
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    moments: list[Tensor] = field(default_factory=list)  # where the encoder is: reading them would wait for it
    waiting: list[Tensor] = field(default_factory=list)

    def add(self, batch: RawBatch) -> None:
        """Take decoded rows."""
        count = len(batch["id"])
        self.bad |= batch["bad"]
        self.seen += count + len(batch["bad"])
        self.ids += batch["id"].tolist()
        self.labels += batch["label"].tolist() if "label" in batch else [-1] * count
        self.captions += batch.get("captions", [])
        self.waiting += batch["image"] if count else []

    def take_up(self, encoder: Encode, batch_size: int) -> bool:
        """Encode full batches, at the end of the shard the rest; whether this was the end.

        So a batch holds the same images whatever they were read together with.
        """
        whole = self.seen == len(self.rows)
        while len(self.waiting) >= (1 if whole else batch_size):
            self.moments.append(_encoded(torch.stack(self.waiting[:batch_size]), encoder, self.made.flips))
            del self.waiting[:batch_size]
        return whole


class _Work:
    """(start, count) of what is to be decoded, claimed shard by shard as it is asked for.

    Rows of a source without random access come by blocks, each to one worker.
    """

    def __init__(
        self, source: Source, folder: Path, cache_metadata: CacheMetadata, batch_size: int, progress: Progress
    ):
        self.source, self.folder, self.cache_metadata, self.batch_size = source, folder, cache_metadata, batch_size
        self.progress, self.claimed = progress, deque[_Shard]()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.cache_metadata.shard_rows
        for index in range(self.cache_metadata.shards):
            claim = contextlib.ExitStack()
            mine = claim.enter_context(_claim(self.folder, index))
            present = (self.folder / shard_name(index)).is_file()
            if present or not mine:
                claim.close()
                self.progress.present += present
                self.progress.elsewhere += not present
                continue
            rows = range(index * step, min(len(self.source), (index + 1) * step))
            self.claimed.append(_Shard(index, rows, self.cache_metadata, claim))
            cuts = range(rows.start, rows.stop, self.batch_size) if self.source.random_access else self.source.starts
            edges = [rows.start, *(int(c) for c in cuts if rows.start < c < rows.stop), rows.stop]
            yield from ((a, b - a) for a, b in itertools.pairwise(sorted(set(edges))))


@torch.no_grad()
def _encoded(pixels: Tensor, encoder: Encode, flips: int) -> Tensor:
    """Moments `(b, flips, 2 c, h, w)` in float16 of raw pixels `(b, 3, h, w)`."""
    views = [pixels, pixels.flip(-1)][:flips]
    moments = [torch.cat(encoder(to_float(view)), dim=1) for view in views]
    return torch.stack(moments, dim=1).half()


def _write_shard(shard: _Shard, folder: Path, transform: Transform, encoder: Encode) -> None:
    # a shard of bad images alone has the shape of the others
    blank = torch.zeros(1, transform.channels, *sides(transform.image_size), dtype=torch.uint8)
    parts = shard.moments or [_encoded(blank, encoder, shard.made.flips)[:0]]
    tensors = {
        "moments": torch.cat(parts).cpu(),
        "row": torch.tensor(shard.ids, dtype=torch.int64),
        "label": torch.tensor(shard.labels, dtype=torch.int64),
    }
    about = {"captions": shard.captions, "bad": shard.bad, "passport": shard.made.mark}
    write_tensors(folder / shard_name(shard.index), tensors, {HEADER: json.dumps(about)})
