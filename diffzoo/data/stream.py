"""From an order and a source to batches: reading, decoding and the loaders that overlap them with training."""

import hashlib
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diffzoo.data.order import Order, Place
from diffzoo.data.sources import Record, Source, unlabelled
from diffzoo.data.transforms import Crop, Pixels, Resize, augment, decode, resize_crop, uniform
from diffzoo.errors import UserError

__all__ = [
    "BatchMaker",
    "EvalBatches",
    "Transform",
    "WorkerLoader",
    "check_bad",
    "hash_of_ids",
    "note_bad",
    "worker_failure",
]

RawBatch = dict[str, Any]


class BadImage(Exception):
    """A picture that cannot be decoded."""


def check_bad(bad: Mapping[int, str], max_bad: int, name: str) -> None:
    """Stop when more pictures are bad than the settings allow.

    Args:
        bad: reasons by row.
        max_bad: how many there may be.
        name: of the source.

    Raises:
        UserError: there are more.
    """
    if len(bad) > max_bad:
        raise UserError(
            f"{len(bad)} pictures of {name} cannot be decoded, more than max_bad = {max_bad} allows; "
            f"the last is {list(bad.values())[-1]}"
        )


def note_bad(known: dict[int, str], new: Mapping[int, str], max_bad: int, name: str, verb: str) -> None:
    """Add bad pictures to those that are known, warn of each once, and stop when there are too many.

    Args:
        known: reasons by row, changed in place.
        new: those of a batch.
        max_bad: how many there may be in all.
        name: of the source.
        verb: what was done with them, for the warning.

    Raises:
        UserError: there are too many.
    """
    for row, reason in new.items():
        if row not in known:
            known[row] = reason
            warnings.warn(f"{verb} a bad picture ({len(known)} so far): {reason}")
    check_bad(known, max_bad, name)


def hash_of_ids(ids: Iterable[int]) -> str:
    """SHA-256 of rows in their order, each as eight bytes, little-endian."""
    return hashlib.sha256(np.fromiter(ids, dtype="<i8").tobytes()).hexdigest()


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
    fetched in the background while the window before is used up, unless `ahead` is False.
    """

    def __init__(self, source: Source, order: Order, ahead: bool = True):
        self.source, self.order, self.ahead = source, order, ahead and source.remote
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
        if not self.ahead or not len(self.order.window_rows(after)):
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
            positions stay what they are; "leave out": the batch is that much smaller, or empty; "error": stop.
        cache: keep decoded pictures in memory. For centre crops of small sets.
    """

    key = "image"  # of the batch
    ahead = True  # whether to fetch the next window in the background

    def __init__(self, source: Source, order: Order, transform: Transform, on_bad_image: str, cache: bool):
        self.source, self.order, self.transform = source, order, transform
        self.on_bad_image = on_bad_image
        self._cache: dict[int, tuple[Pixels, Record]] | None = {} if cache else None
        self._bad: dict[int, str] = {}
        self._reader: Reader | None = None

    def __call__(self, start: int, count: int) -> RawBatch:
        """Samples at positions start … start + count - 1, and under "bad" what could not be decoded."""
        known = len(self._bad)
        found = [(p, self._sample(place)) for p, place in enumerate(self.order.places(start, count), start)]
        good = [(p, sample) for p, sample in found if sample is not None]
        batch: RawBatch = {"id": torch.empty(0, dtype=torch.int64)}
        if good:
            batch = self.collate([sample for _, sample in good], [p for p, _ in good])
        batch["bad"] = dict(itertools.islice(self._bad.items(), known, None))
        return batch

    def collate(self, samples: Sequence[tuple[Any, Record, int]], index: Sequence[int]) -> RawBatch:
        """The samples at the positions `index` as one batch."""
        return collate(self.key, samples, index, self.source)

    def _sample(self, place: Place) -> tuple[Pixels, Record, int] | None:
        """(pixels, record, row), or None for a picture that is left out."""
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
        if self.on_bad_image == "leave out":
            return None
        raise UserError(f"no picture near row {place.row} of {self.source.name} can be decoded")

    def _candidates(self, place: Place) -> Iterator[int]:
        """The row of a place; to replace it, the rows shown after it in its window, then those before it."""
        yield place.row
        if self.on_bad_image == "leave out":
            return
        rows = self.order.window_rows(place.window)
        at = int(np.flatnonzero(rows == place.row)[0])
        yield from (int(r) for r in np.roll(rows, -at - 1)[:-1])

    def _decoded(self, place: Place, draws: tuple[float, ...]) -> tuple[Pixels, Record]:
        if self._cache is not None and place.row in self._cache:
            return self._cache[place.row]
        self._reader = self._reader or Reader(self.source, self.order, self.ahead)
        record = self._reader(place)
        result = self.transform.pixels(record, draws), Record(None, record.label, record.captions, record.name)
        if self._cache is not None:
            self._cache[place.row] = result
        return result

    def _one_caption(self, record: Record, row: int, visit: int) -> Record:
        if len(record.captions) < 2:
            return record
        pick = int(uniform("caption", self.transform.seed, row, visit) * len(record.captions))
        return Record(None, record.label, (record.captions[pick],), record.name)

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
        raise unlabelled(record.name, source.name)
    return record.label


class _Batches(Dataset[Any]):
    """The batch of a span; a UserError travels as a batch.

    The loader deals spans to its workers in turn and takes the batches back in the same turn, so their order does not
    depend on how many workers there are.
    """

    def __init__(self, make: Any):
        self.make = make

    def __getitem__(self, span: tuple[int, int]) -> Any:
        try:
            return self.make(*span)
        except UserError as error:
            return error


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
        spans: (start, count) of each batch; taken in this process, as far ahead as there are batches under way.
        num_workers: processes; 0 makes batches in this one.
        prefetch: batches under way per worker.
    """

    def __init__(self, make: Any, spans: Iterable[tuple[int, int]], num_workers: int, prefetch: int = 4):
        loader: DataLoader[Any] = DataLoader(
            _Batches(make),
            batch_size=None,
            sampler=spans,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=prefetch if num_workers else None,
        )
        with _worker_deaths_wait():
            self._iterator: Any = iter(loader)

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        try:
            batch = next(self._iterator)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not isinstance(error, RuntimeError) and self._a_worker_ended():
                # it was killed while a batch was handed over, and PyTorch saw it alive
                raise worker_failure(RuntimeError(f"DataLoader worker exited: {error}")) or error from error
            raise (worker_failure(error) or error) from error
        if isinstance(batch, UserError):
            raise batch
        return dict(batch)

    def _a_worker_ended(self) -> bool:
        sentinels = [worker.sentinel for worker in getattr(self._iterator, "_workers", [])]
        return bool(wait(sentinels, timeout=2.0))

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

    Pictures that cannot be decoded are left out, unless `make` stops at them. As every rank has to give equally many
    batches, one that would be empty is made up for by a picture of another batch.

    Args:
        make: of the source, in sequential order.
        spans: of this rank.
        num_workers: decoding processes.
        bad: where to note bad pictures, by row; None: in a dictionary of its own.
        max_bad: how many there may be.
    """

    def __init__(
        self,
        make: "BatchMaker",
        spans: EvalSpans,
        num_workers: int,
        bad: dict[int, str] | None = None,
        max_bad: int = 100,
    ):
        if make.on_bad_image == "skip":
            make.on_bad_image = "leave out"
        self._make, self._spans, self._workers = make, spans, num_workers
        self.bad, self._max_bad = {} if bad is None else bad, max_bad

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
                raise UserError(f"none of the pictures of {name} that were tried can be decoded")
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
