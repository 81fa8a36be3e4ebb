"""From an order and a source to batches: reading, decoding and the loaders that overlap them with training."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffzoo.data.order import Order, Place
from diffzoo.data.sources import Record, Source
from diffzoo.data.transforms import Crop, Pixels, Resize, augment, decode, resize_crop, uniform
from diffzoo.errors import UserError

__all__ = ["BatchMaker", "EvalBatches", "Transform", "WorkerLoader", "worker_failure"]

RawBatch = dict[str, Any]


class BadImage(Exception):
    """A picture that cannot be decoded."""


@dataclass(frozen=True)
class Transform:
    """What happens to a picture between its file and the batch; see `transforms`."""

    image_size: int
    resize: Resize = "adm"
    crop: Crop = "center"
    flip: bool = True
    fast_jpeg: bool = False
    seed: int = 0

    def held_out(self) -> "Transform":
        """The same without random choices."""
        return Transform(self.image_size, self.resize, "center", False, self.fast_jpeg, self.seed)

    def pixels(self, record: Record, draws: tuple[float, ...]) -> Pixels:
        """`(3, h, w)` before mirroring.

        Raises:
            BadImage: the picture is missing, truncated or none.
        """
        if record.image is None:
            raise BadImage(f"{record.name}: no picture data")
        try:
            image = decode(record.image, 2 * self.image_size if self.fast_jpeg else None)
            square = resize_crop(image, self.image_size, self.resize, self.crop, draws)
        except Exception as error:  # Pillow raises nearly any type on broken data
            raise BadImage(f"{record.name}: {type(error).__name__}: {error}") from error
        return square.transpose(2, 0, 1)


class Reader:
    """Rows at places, read block by block without reading a block twice for one lane.

    A lane's places walk through windows. Of a source without random access the blocks of the current window are
    held, one set per lane; those that the next window shares are kept, the others let go. Blocks of a remote source are
    fetched in the background while the window before is used up.
    """

    def __init__(self, source: Source, order: Order):
        self.source, self.order = source, order
        self._held: dict[int, tuple[tuple[int, int, int], dict[int, Sequence[Record]]]] = {}
        self._coming: dict[tuple[int, int, int], Future[dict[int, Sequence[Record]]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, place: Place) -> Record:
        if self.source.random_access:
            return self.source.read_row(place.row)
        block, within = self.source.locate(place.row)
        return self._blocks(place.window)[block][within]

    def _blocks(self, window: tuple[int, int, int]) -> dict[int, Sequence[Record]]:
        lane = window[1]
        held, blocks = self._held.get(lane, (None, {}))
        if held != window:
            coming = self._coming.pop(window, None)
            blocks = coming.result() if coming is not None else self._read(window, blocks)
            self._held[lane] = window, blocks
            self._fetch_ahead(window, blocks)
        return blocks

    def _read(self, window: tuple[int, int, int], have: dict[int, Sequence[Record]]) -> dict[int, Sequence[Record]]:
        rows = self.order.window_rows(window)
        needed = np.unique(np.searchsorted(self.source.starts, rows, side="right") - 1)
        return {int(b): have[b] if b in have else self.source.read_block(int(b)) for b in needed}

    def _fetch_ahead(self, window: tuple[int, int, int], have: dict[int, Sequence[Record]]) -> None:
        epoch, lane, number = window
        after = (epoch, lane, number + 1)
        if not self.source.remote or not len(self.order.window_rows(after)):
            return
        self._pool = self._pool or ThreadPoolExecutor(1)  # one at a time: files are shared between reads
        self._coming[after] = self._pool.submit(self._read, after, have)


class BatchMaker:
    """Makes the part of a global batch that begins at a position; the same on every machine.

    Args:
        source: rows.
        order: which row at which position.
        transform: how pictures are treated.
        on_bad_image: "skip": a picture that cannot be decoded is replaced by the next good one of its window, so
            positions stay what they are; "error": stop.
        cache: keep decoded pictures in memory. For centre crops of small sets.
    """

    key = "image"  # of the batch

    def __init__(self, source: Source, order: Order, transform: Transform, on_bad_image: str, cache: bool):
        self.source, self.order, self.transform = source, order, transform
        self.on_bad_image = on_bad_image
        self._cache: dict[int, tuple[Pixels, Record]] | None = {} if cache else None
        self._bad: dict[int, str] = {}
        self._reader: Reader | None = None

    def __call__(self, start: int, count: int) -> RawBatch:
        """Samples at positions start … start + count - 1, and under "bad" what could not be decoded."""
        known = len(self._bad)
        samples = [self._sample(place) for place in self.order.places(start, count)]
        batch = collate(self.key, samples, range(start, start + count), self.source)
        batch["bad"] = dict(itertools.islice(self._bad.items(), known, None))
        return batch

    def _sample(self, place: Place) -> tuple[Pixels, Record, int]:
        for row in self._candidates(place):
            if row in self._bad:
                continue
            draws, mirrored = augment(self.transform.seed, row, place.visit, self.transform.crop, self.transform.flip)
            try:
                pixels, record = self._decoded(Place(row, place.visit, place.window), draws)
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise UserError(
                        f"cannot decode {error}; remove it, or set on_bad_image to 'skip' to go on without it"
                    ) from error
                self._bad[row] = str(error)
                continue
            record = self._one_caption(record, row, place.visit)
            return pixels[:, :, ::-1] if mirrored else pixels, record, row
        raise UserError(f"no picture near row {place.row} of {self.source.name} can be decoded")

    def _candidates(self, place: Place) -> Iterator[int]:
        """The row of a place, then the rows shown after it in its window, then those before it."""
        yield place.row
        rows = self.order.window_rows(place.window)
        at = int(np.flatnonzero(rows == place.row)[0])
        yield from (int(r) for r in np.roll(rows, -at - 1)[:-1])

    def _decoded(self, place: Place, draws: tuple[float, ...]) -> tuple[Pixels, Record]:
        if self._cache is not None and place.row in self._cache:
            return self._cache[place.row]
        self._reader = self._reader or Reader(self.source, self.order)
        record = self._reader(place)
        result = self.transform.pixels(record, draws), Record(None, record.label, record.captions)
        if self._cache is not None:
            self._cache[place.row] = result
        return result

    def _one_caption(self, record: Record, row: int, visit: int) -> Record:
        if len(record.captions) < 2:
            return record
        pick = int(uniform("caption", self.transform.seed, row, visit) * len(record.captions))
        return Record(None, record.label, (record.captions[pick],))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def collate(key: str, samples: Sequence[tuple[Any, Record, int]], index: Sequence[int], source: Source) -> RawBatch:
    """One batch of (array, record, row) as `diffzoo.typing.Batch`."""
    batch: RawBatch = {
        key: _stacked([array for array, _, _ in samples]),
        "index": torch.tensor(list(index), dtype=torch.int64),
        "id": torch.tensor([row for _, _, row in samples], dtype=torch.int64),
    }
    if source.class_names:
        batch["label"] = torch.tensor([_label(r, source) for _, r, _ in samples], dtype=torch.int64)
    if source.has_captions:
        batch["caption"] = [r.captions[0] for _, r, _ in samples]
    return batch


def _stacked(arrays: Sequence[Any]) -> Tensor:
    """The arrays in one contiguous tensor; `np.stack` would keep their transposed order in memory and copy twice.

    In a worker it lies in shared memory from the start, so that sending it copies nothing.
    """
    first = torch.from_numpy(np.ascontiguousarray(arrays[0]))
    shape = (len(arrays), *first.shape)
    out = torch.empty(0, dtype=first.dtype)
    if get_worker_info() is not None:
        storage = out.untyped_storage()._new_shared(len(arrays) * first.nbytes)
        out = out.set_(storage, 0, shape)  # type: ignore[call-overload]
    else:
        out = torch.empty(shape, dtype=first.dtype)
    for place, array in zip(out.numpy(), arrays, strict=True):
        place[...] = array
    return out


def _label(record: Record, source: Source) -> int:
    if record.label is None:
        raise UserError(f"{record.name or 'a row'} of {source.name} has no label")
    return record.label


class _Batches(IterableDataset):
    """Batches start, start + stride, …, dealt to the workers in turn; a UserError travels as a batch.

    The loader takes batches from its workers in the same turn, so their order does not depend on how many there are.
    """

    def __init__(self, make: Any, spans: Any):
        self.make, self.spans = make, spans

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for start, count in itertools.islice(self.spans(), worker, None, workers):
            try:
                batch = self.make(start, count)
            except UserError as error:
                batch = error
            yield batch


def _identity(batch: Any) -> Any:
    return batch


def worker_failure(error: BaseException) -> UserError | None:
    """The sentence for the death of a worker process, or None for other errors."""
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return None
    return UserError(
        "a data worker was killed, most likely because memory ran out: set fewer num_workers, a smaller "
        f"shuffle_window, or free memory, and resume from the last checkpoint ({str(error).splitlines()[0]})"
    )


@contextmanager
def _worker_deaths_wait() -> Iterator[None]:
    """Start workers without PyTorch's signal handler, which raises their death in the middle of whatever runs.

    In an optimizer's step this would leave half of the weights moved. Without it the death is noticed where the next
    batch is asked for, within seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        ours = handler if getattr(handler, "__module__", "") != "torch.utils.data._utils.signal_handling" else None
        signal.signal(signal.SIGCHLD, ours or signal.SIG_DFL)


class WorkerLoader:
    """An iterator over batches made by worker processes, with errors as sentences.

    Args:
        make: (start, count) → batch.
        spans: () → iterator of (start, count).
        num_workers: processes; 0 makes batches in this one.
    """

    def __init__(self, make: Any, spans: Any, num_workers: int):
        loader: DataLoader[Any] = DataLoader(
            _Batches(make, spans),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if num_workers else None,
        )
        with _worker_deaths_wait():
            self._iterator: Any = iter(loader)

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            raise (worker_failure(error) or error) from error
        if isinstance(batch, UserError):
            raise batch
        return dict(batch)

    def close(self) -> None:
        """End the workers."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._iterator = iter(())


@dataclass(frozen=True)
class Spans:
    """The endless (start, count) of one rank: its slice, in `parts`, of every global batch from `position` on."""

    position: int
    batch: int
    rank: int
    world: int
    parts: int = 1

    def __call__(self) -> Iterator[tuple[int, int]]:
        mine = self.batch // self.world
        micro = mine // self.parts
        for start in itertools.count(self.position + self.rank * mine, self.batch):
            for part in range(self.parts):
                yield start + part * micro, micro


@dataclass(frozen=True)
class EvalSpans:
    """(start, count) of one rank's share of `rows`: contiguous, disjoint, and equally many batches on every rank."""

    rows: int
    batch: int
    rank: int
    world: int

    def __len__(self) -> int:
        largest = -(-self.rows // self.world)
        return -(-largest // max(1, self.batch // self.world))

    def __call__(self) -> Iterator[tuple[int, int]]:
        first, last = (self.rows * r // self.world for r in (self.rank, self.rank + 1))
        edges = [first + (last - first) * k // len(self) for k in range(len(self) + 1)]
        return ((a, b - a) for a, b in itertools.pairwise(edges) if b > a)


class EvalBatches:
    """The held-out rows in their order, each once; deterministic transforms, first captions."""

    def __init__(self, make: "BatchMaker", spans: EvalSpans, num_workers: int):
        self._make, self._spans, self._workers = make, spans, num_workers

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[RawBatch]:
        loader = WorkerLoader(self._make, self._spans, self._workers)
        try:
            for batch in loader:
                batch.pop("bad")
                yield batch
        finally:
            loader.close()


class Sequential(Order):
    """Rows in the order of the source."""

    def __init__(self, source: Source):
        self.source, self.rows = source, len(source)

    def place(self, position: int) -> Place:
        return Place(position, 0, (0, 0, self.source.locate(position)[0]))

    def window_rows(self, window: tuple[int, int, int]) -> Any:
        block = window[2]
        if block >= len(self.source.block_sizes):
            return np.arange(0)
        return np.arange(self.source.starts[block], self.source.starts[block + 1])

    def state(self) -> dict[str, Any]:
        return {"kind": "sequential"}


def auto_workers(cached: bool, world: int = 1) -> int:
    """How many worker processes suit this machine: none for cached sets, else a power of two up to 8 per rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, world)
    if cached or share < 2:
        return 0
    return next(n for n in (8, 4, 2, 1) if n < share)
