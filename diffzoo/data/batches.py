"""From an order and a source to batches: reading and decoding."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from diffzoo.data.bad_images import BadImage
from diffzoo.data.decode import Pixels, ValueRange, decode_bands
from diffzoo.data.order import Order, Place
from diffzoo.data.sources import Record, Source, unlabelled
from diffzoo.data.transforms import Crop, Resize, augment, resize_crop, uniform
from diffzoo.errors import UserError
from diffzoo.sizes import Size, sides

__all__ = ["BatchMaker", "RawBatch", "Reader", "Sample", "Transform"]

RawBatch = dict[str, Any]
Sample = tuple[np.ndarray, Record, int]  # array, record, row


@dataclass(frozen=True)
class Transform:
    """The steps from an image file to the pixels of a batch; see `transforms`."""

    image_size: Size
    resize: Resize = "adm"
    crop: Crop = "center"
    flip: bool = True
    fast_jpeg: bool = False
    seed: int = 0
    channels: int = 3
    value_range: ValueRange | None = None

    def held_out(self) -> "Transform":
        """The same without random choices."""
        return replace(self, crop="center", flip=False)

    def pixels(self, record: Record, draws: tuple[float, ...]) -> Pixels:
        """`(channels, h, w)` before mirroring.

        Raises:
            BadImage: the image is missing, truncated or none, or has another number of channels.
        """
        if record.image is None:
            raise BadImage(f"{record.name}: no image data" + (f", {record.why}" if record.why else ""))
        try:
            draft = 2 * max(sides(self.image_size)) if self.fast_jpeg else None
            bands = decode_bands(record.image, self.channels, draft, self.value_range)
            parts = [resize_crop(band, self.image_size, self.resize, self.crop, draws) for band in bands]
            pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        except Exception as error:  # Pillow raises nearly any type on broken data
            raise BadImage(f"{record.name}: {type(error).__name__}: {error}") from error
        return pixels.transpose(2, 0, 1)


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
        transform: how images are treated.
        on_bad_image: "skip": an image that cannot be decoded is replaced by the next good one of its window, so
            positions stay what they are; "leave out": the batch is that much smaller, or empty; "error": stop.
        cache: keep decoded images in memory. For centre crops of small sets.
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

    def collate(self, samples: Sequence[Sample], index: Sequence[int]) -> RawBatch:
        """The samples at the positions `index` as one batch; see `diffzoo.typing.Batch`."""
        batch: RawBatch = {
            self.key: _stacked([array for array, _, _ in samples]),
            "index": torch.tensor(list(index), dtype=torch.int64),
            "id": torch.tensor([row for _, _, row in samples], dtype=torch.int64),
        }
        if self.source.class_names:
            lacking = next((record for _, record, _ in samples if record.label is None), None)
            if lacking is not None:
                raise unlabelled(lacking.name, self.source.name)
            batch["label"] = torch.tensor([record.label for _, record, _ in samples], dtype=torch.int64)
        if self.source.has_captions:
            batch["caption"] = [record.captions[0] for _, record, _ in samples]
        return batch

    def _sample(self, place: Place) -> Sample | None:
        """The pixels of a place, or None for an image that is left out."""
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
        raise UserError(
            f"no image near row {place.row} of {self.source.name} can be decoded: {next(reversed(self._bad.values()))}"
        )

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
        record, size = self._reader(place), self.order.size_of(place.row)
        transform = self.transform if size is None else replace(self.transform, image_size=size)
        result = transform.pixels(record, draws), replace(record, image=None, why="")
        if self._cache is not None:
            self._cache[place.row] = result
        return result

    def _one_caption(self, record: Record, row: int, visit: int) -> Record:
        if len(record.captions) < 2:
            return record
        pick = int(uniform("caption", self.transform.seed, row, visit) * len(record.captions))
        return replace(record, captions=(record.captions[pick],))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
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
