"""Aspect buckets: images of several shapes in one run, every batch of one shape.

Each row belongs to the bucket whose aspect is nearest to its own. A bucket's rows come in an endless sequence of
permutations of their own; the buckets take turns batch by batch, as often as their rows are many. Batch `m` of the run,
and with it the place at every position, is a function of the seed, `m`, the batch size and the rows alone, so that
resume is exact on any number of ranks and workers, and no row is dropped to fill a batch.

Turn `e` is one pass over the data. Before it, bucket `b` of `n_b` rows has had

    K_b(e) = floor((e n_b + o_b) / B)    batches of B, with an offset o_b < B of its own,                           (1)

so that it never lags or leads by a batch; the batches of a turn are shuffled.
"""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from diffzoo.cache import cache_dir
from diffzoo.data.decode import load
from diffzoo.data.order import Indices, Memory, Order, Place, permutation
from diffzoo.data.sources import Source
from diffzoo.errors import UserError
from diffzoo.files import atomic_path
from diffzoo.rng import key
from diffzoo.sizes import Size, sides

__all__ = ["Bucketed", "aspects", "nearest"]

UNKNOWN = 1.0  # aspect of what cannot be read, which is dealt with where it is decoded


class _Turns:
    """Which bucket each batch belongs to, from the number of rows of each bucket."""

    def __init__(self, rows: Sequence[int], seed: int, batch: int):
        self._rows, self._total, self._seed, self._batch = np.array(rows, dtype=np.int64), sum(rows), seed, batch
        self._offset = np.array([key("bucket", seed, b) % batch for b in range(len(rows))], dtype=np.int64)
        self._made: Memory[tuple[int, Indices, Indices]] = Memory(4)

    def _before(self, turn: int) -> Indices:
        """(1), for each bucket."""
        return (turn * self._rows + self._offset) // self._batch

    def batch(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches of it came before."""
        low, high = 0, (number + len(self._rows)) * self._batch // self._total + 1
        while high - low > 1:  # the turn: the last one that does not begin after the batch
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle).sum() <= number else (low, middle)
        first, buckets, ordinals = self._made.get_or_make(low, lambda: self._turn(low))
        return int(buckets[number - first]), int(ordinals[number - first])

    def _turn(self, turn: int) -> tuple[int, Indices, Indices]:
        """(its first batch, the bucket of each batch, how many batches of that came before)."""
        before, after = self._before(turn), self._before(turn + 1)
        buckets = np.repeat(np.arange(len(self._rows)), after - before)
        buckets = buckets[permutation(len(buckets), self._seed, "buckets", turn)]
        ordinals = np.empty_like(buckets)
        for b, start in enumerate(before):
            ordinals[buckets == b] = start + np.arange((buckets == b).sum())
        return int(before.sum()), buckets, ordinals


class Bucketed(Order):
    """Batches of one shape each.

    Args:
        bucket: of each row, `(rows,)`.
        sizes: height and width of each bucket.
        seed: of the order.
        batch: images of a global batch.
    """

    def __init__(self, bucket: Indices, sizes: Sequence[Size], seed: int, batch: int):
        self.rows, self.sizes, self.seed, self.batch, self._bucket = len(bucket), tuple(sizes), seed, batch, bucket
        self._members = [np.flatnonzero(bucket == b) for b in range(len(sizes))]
        self._turns = _Turns([len(m) for m in self._members], seed, batch)
        self._orders: Memory[Indices] = Memory(4 * len(sizes))

    def state(self) -> dict[str, object]:
        return {
            "kind": "buckets",
            "seed": self.seed,
            "batch": self.batch,
            "sizes": [list(sides(s)) for s in self.sizes],
        }

    def size_of(self, row: int) -> Size:
        return self.sizes[self._bucket[row]]

    def place(self, position: int) -> Place:
        number, within = divmod(position, self.batch)
        bucket, ordinal = self._turns.batch(number)
        visit, index = divmod(ordinal * self.batch + within, len(self._members[bucket]))
        window = (visit, bucket, 0)
        return Place(int(self.window_rows(window)[index]), visit, window)

    def window_rows(self, window: tuple[int, int, int]) -> Indices:
        visit, bucket, _ = window
        rows = self._members[bucket]
        return self._orders.get_or_make(
            window, lambda: rows[permutation(len(rows), self.seed, "bucket rows", bucket, visit)]
        )


def nearest(aspect: NDArray[np.float64], sizes: Sequence[Size]) -> Indices:
    """The bucket of each image: that with the nearest logarithm of height / width, the first of equals.

    Args:
        aspect: height / width of each image, `(rows,)`.
        sizes: of the buckets.
    """
    known = np.log([sides(size)[0] / sides(size)[1] for size in sizes])
    return np.abs(np.log(aspect)[:, None] - known).argmin(1)


def aspects(source: Source) -> NDArray[np.float64]:
    """Height / width of each image, `(rows,)`, turned as its EXIF tag says; read once, then kept in the cache.

    Raises:
        UserError: the rows are not read one by one, so that no one knows their shapes before they come.
    """
    if not source.random_access:
        raise UserError(
            f"buckets need the shape of every image before training, which {source.name} does not give, since it is "
            "read block by block: fetch it first (streaming: false), or leave buckets out"
        )
    path = Path(cache_dir()) / "aspects" / f"{source.rows_hash}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    found = np.fromiter((_aspect(source, row) for row in range(len(source))), np.float64, len(source))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, found)
    return found


def _aspect(source: Source, row: int) -> float:
    data = source.read_row(row).image or b""
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.width / image.height if turned else image.height / image.width
    except Exception:  # Pillow raises nearly any type on broken data
        with contextlib.suppress(Exception):
            width, height = load(data).size
            return height / width
    return UNKNOWN
