"""The endless sequence of training samples as a pure function of a position.

Position `p` of the stream is sample `p % rows` of epoch `p // rows`, and `Order.rows_at(p …)` says which row of the
source that is, without walking through what came before. So the state of a run is one integer, and it means the same
thing for any number of ranks and workers. Consecutive positions make up the global batches; epochs follow one another
without a gap, so a batch may hold the end of one and the start of the next, every batch is full, and every row comes
exactly once per epoch.

How random order and sequential reading go together. A source comes in *blocks* (Parquet row groups, shards) that are
cheap to read whole. For each epoch the blocks are permuted, which puts all rows in one long line; the line is cut
into `lanes` of equal length (to a row), and each lane is shuffled within windows of `window` rows. Positions visit the
lanes in turn, `run` positions at a time. With `run = batch / 8` and 64 lanes, batch `s` draws from the eight lanes of
group `s mod 8`: a loader with 1, 2, 4 or 8 workers, on 1, 2, 4 or 8 ranks, reads every block once instead of once per
process. Since each lane holds an equal share of rows, few or uneven blocks unbalance nothing.

With one lane and a window as long as the epoch the order is a full permutation; sources with random access use that.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from math import gcd
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffzoo.rng import key
from diffzoo.sizes import Size

__all__ = ["Balanced", "LaneOrder", "Order", "Place", "full_shuffle", "lanes_for", "permutation"]

T = TypeVar("T")
Indices = NDArray[np.int64]

GROUPS = 8  # loaders with this many workers, or a divisor of it, read each block once; so do as many ranks


def permutation(n: int, *parts: int | str) -> Indices:
    """A permutation of 0…n-1 that is a function of `parts`.

    Sorting raw Philox output, whose stream NumPy guarantees; `Generator.permutation` may change between versions.
    """
    return np.argsort(np.random.Philox(key("permutation", *parts)).random_raw(n), kind="stable")


@dataclass(frozen=True)
class Place:
    """Where a sample comes from.

    row:    index of the row among those of the source, in the order of its blocks.
    visit:  how often this row has been shown before; keys the random choices of its transform.
    window: key of a group of places that are read together, for sources that are read block by block.
    """

    row: int
    visit: int
    window: tuple[int, int, int]


class Order:
    """Which row the stream shows at a position."""

    rows: int  # per epoch

    def places(self, start: int, count: int) -> list[Place]:
        """The places at positions start … start + count - 1."""
        return [self.place(p) for p in range(start, start + count)]

    def place(self, position: int) -> Place:
        """The place at one position."""
        raise NotImplementedError

    def window_rows(self, window: tuple[int, int, int]) -> Indices:
        """All rows of a window, in the order in which they are shown."""
        raise NotImplementedError

    def size_of(self, row: int) -> Size | None:
        """Height and width that a row is shown in; None = those of the transform."""
        return None

    def state(self) -> dict[str, object]:
        """What the order depends on besides the source: goes into checkpoints."""
        raise NotImplementedError


class Memory(Generic[T]):
    """The most recently made few of something costly; copies of it begin empty, which a worker fills faster."""

    def __init__(self, size: int):
        self.size = size
        self._made: OrderedDict[Hashable, T] = OrderedDict()

    def __reduce__(self) -> tuple[type["Memory[T]"], tuple[int]]:
        return type(self), (self.size,)

    def get_or_make(self, name: Hashable, make: Callable[[], T]) -> T:
        """What was made under a name; it is made if it is not there."""
        if name in self._made:
            self._made.move_to_end(name)
            return self._made[name]
        self._made[name] = value = make()
        while len(self._made) > self.size:
            self._made.popitem(last=False)
        return value


@dataclass(frozen=True)
class Layout:
    """The numbers of a LaneOrder; see the module."""

    seed: int
    lanes: int
    run: int
    window: int


def full_shuffle(seed: int, rows: int) -> Layout:
    """The layout of a source with random access: every epoch a permutation of all rows."""
    return Layout(seed, lanes=1, run=1, window=max(1, rows))


def lanes_for(seed: int, batch: int, lanes: int, window: int) -> Layout:
    """The layout of a source that is read block by block; `batch` is the global batch.

    Args:
        lanes: about how many blocks may be open at once, over all ranks and workers.
        window: how many rows they hold together, which is what a shuffle buffer of that size mixes.
    """
    per_batch = gcd(batch, max(1, lanes // GROUPS))
    groups = max(1, min(GROUPS, lanes // per_batch))
    return Layout(seed, groups * per_batch, batch // per_batch, max(1, window // (groups * per_batch)))


class LaneOrder(Order):
    """Permuted blocks, cut into lanes, shuffled in windows.

    Args:
        block_sizes: rows of each block.
        layout: seed, lanes, run and window.
    """

    def __init__(self, block_sizes: Indices, layout: Layout):
        self.block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self.layout = layout
        self.rows = int(self.block_sizes.sum())
        self._starts = np.concatenate([[0], np.cumsum(self.block_sizes)])
        self._epochs: Memory[tuple[Indices, Indices, Indices]] = Memory(3)
        self._windows: Memory[Indices] = Memory(4 * layout.lanes)

    def state(self) -> dict[str, object]:
        return {"kind": "lanes", **asdict(self.layout)}

    def _before(self, lane: int, position: int) -> int:
        """How many positions before `position`, from the beginning of the stream, belong to a lane."""
        turns, rest = divmod(position, self.layout.run * self.layout.lanes)
        return turns * self.layout.run + min(max(rest - lane * self.layout.run, 0), self.layout.run)

    def _epoch(self, epoch: int) -> tuple[Indices, Indices, Indices]:
        """(blocks in their order, where each begins in the line, where each lane begins in the line)."""

        def make() -> tuple[Indices, Indices, Indices]:
            blocks = permutation(len(self.block_sizes), self.layout.seed, "blocks", epoch)
            begins = np.concatenate([[0], np.cumsum(self.block_sizes[blocks])])
            first, last = epoch * self.rows, (epoch + 1) * self.rows
            sizes = [self._before(k, last) - self._before(k, first) for k in range(self.layout.lanes)]
            return blocks, begins, np.concatenate([[0], np.cumsum(sizes)])

        return self._epochs.get_or_make(epoch, make)

    def window_rows(self, window: tuple[int, int, int]) -> Indices:
        def make() -> Indices:
            epoch, lane, number = window
            blocks, begins, lanes = self._epoch(epoch)
            first = lanes[lane] + number * self.layout.window
            last = min(first + self.layout.window, lanes[lane + 1])
            line = first + permutation(int(last - first), self.layout.seed, "window", *window)
            at = np.searchsorted(begins, line, side="right") - 1
            return self._starts[blocks[at]] + line - begins[at]

        return self._windows.get_or_make(window, make)

    def place(self, position: int) -> Place:
        epoch, layout = position // self.rows, self.layout
        lane = position // layout.run % layout.lanes
        index = self._before(lane, position) - self._before(lane, epoch * self.rows)
        window = (epoch, lane, index // layout.window)
        return Place(int(self.window_rows(window)[index % layout.window]), epoch, window)


class Balanced(Order):
    """Every class equally often: classes in turn, each through its own endless sequence of permutations.

    An epoch still has as many samples as there are rows; rows of small classes come several times in it.

    Args:
        labels: class of each row, `(rows,)`.
    """

    def __init__(self, labels: Indices, seed: int):
        self.seed, self.rows = seed, len(labels)
        by_class = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
        self._members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1) if len(by_class) else []
        self._orders: Memory[Indices] = Memory(4 * len(self._members))
        self._turns: Memory[Indices] = Memory(256)

    def state(self) -> dict[str, object]:
        return {"kind": "balanced", "seed": self.seed}

    def place(self, position: int) -> Place:
        turn, index = divmod(position, len(self._members))
        classes = self._turns.get_or_make(turn, lambda: permutation(len(self._members), self.seed, "turn", turn))
        k = int(classes[index])
        members = self._members[k]
        visit, index = divmod(turn, len(members))
        order = self._orders.get_or_make((k, visit), lambda: permutation(len(members), self.seed, "class", k, visit))
        return Place(int(members[order[index]]), visit, (visit, k, 0))

    def window_rows(self, window: tuple[int, int, int]) -> Indices:
        return self._members[window[1]]
