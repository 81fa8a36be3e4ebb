"""Which positions make up which batch of which rank, in training and over the held-out rows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diffzoo.data.bad_images import note_bad
from diffzoo.data.batches import BatchMaker, RawBatch
from diffzoo.data.order import Indices, Order, Place
from diffzoo.data.sources import Source
from diffzoo.data.workers import WorkerLoader
from diffzoo.errors import UserError

__all__ = ["EvalBatches", "EvalSpans", "Sequential", "Spans", "micro_batches"]


def micro_batches(batch_size: int, micro_batch_size: int | None, world: int) -> int:
    """Micro-batches that each of `world` ranks takes per global batch.

    Raises:
        UserError: the global batch does not divide.
    """
    if batch_size % world:
        near = [b for b in (batch_size // world * world, -(-batch_size // world) * world) if b]
        raise UserError(
            f"the global batch of {batch_size} does not divide among {world} ranks: "
            f"set batch_size to {' or '.join(map(str, near))}"
        )
    share = batch_size // world
    micro = min(micro_batch_size or share, share)
    if share % micro:
        fits = [m for m in range(1, share + 1) if share % m == 0]
        near = [max(m for m in fits if m < micro), min(m for m in fits if m > micro)]
        raise UserError(
            f"a rank's share of the global batch, {share} of {batch_size}, does not divide into micro-batches "
            f"of {micro}: set micro_batch_size to {' or '.join(map(str, near))}"
        )
    return share // micro


@dataclass(frozen=True)
class Spans:
    """The endless (start, count) of one rank: its slice, in `parts`, of every global batch from `position` on."""

    position: int
    batch: int
    rank: int
    world: int
    parts: int = 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        mine = self.batch // self.world
        micro = mine // self.parts
        for start in itertools.count(self.position + self.rank * mine, self.batch):
            for part in range(self.parts):
                yield start + part * micro, micro


@dataclass(frozen=True)
class EvalSpans:
    """(start, count) of one rank's share of `rows`: contiguous, disjoint, and equally many batches on every rank.

    There are none where some rank would have no row.
    """

    rows: int
    batch: int
    rank: int
    world: int

    def __len__(self) -> int:
        largest = -(-self.rows // self.world)
        return min(-(-largest // max(1, self.batch // self.world)), self.rows // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, last = (self.rows * r // self.world for r in (self.rank, self.rank + 1))
        edges = [first + (last - first) * k // max(1, len(self)) for k in range(len(self) + 1)]
        return ((a, b - a) for a, b in itertools.pairwise(edges))


class EvalBatches:
    """The held-out rows in their order, each once; deterministic transforms, first captions.

    As every rank has to give equally many batches, one that would be empty, because its images cannot be decoded, is
    made up for by an image of another batch.

    Args:
        make: of the source, in sequential order; leaves bad images out, or stops at them.
        spans: of this rank.
        num_workers: decoding processes.
        bad: where to note bad images, by row.
        max_bad: how many there may be.
    """

    def __init__(self, make: BatchMaker, spans: EvalSpans, num_workers: int, bad: dict[int, str], max_bad: int):
        self._make, self._spans, self._workers = make, spans, num_workers
        self.bad, self._max_bad = bad, max_bad

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[RawBatch]:
        loader = WorkerLoader(self._make, self._spans, self._workers)
        name, owed, first = self._make.source.name, 0, {}
        try:
            for batch in loader:
                note_bad(self.bad, batch.pop("bad"), self._max_bad, name, "left out")
                if len(batch["id"]):
                    first = {key: values[:1] for key, values in batch.items()}
                    yield batch
                else:
                    owed += 1
                while first and owed:
                    owed -= 1
                    yield first
            if owed:
                raise UserError(f"none of the images of {name} that were tried can be decoded")
        finally:
            loader.close()


class Sequential(Order):
    """Rows in the order of the source."""

    def __init__(self, source: Source):
        self.source, self.rows = source, len(source)

    def place(self, position: int) -> Place:
        return Place(position, 0, (0, 0, self.source.locate(position)[0]))

    def window_rows(self, window: tuple[int, int, int]) -> Indices:
        block = window[2]
        if block >= len(self.source.block_sizes):
            return np.arange(0)
        return np.arange(self.source.starts[block], self.source.starts[block + 1])

    def state(self) -> dict[str, object]:
        return {"kind": "sequential"}
