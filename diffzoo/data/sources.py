"""A source of rows: image files, tables or tar shards, on this disk or on a server.

A source is a fixed list of rows in *blocks*, each of which is read whole; a source with random access reads any row
alone. Nothing is decoded here.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffzoo.errors import UserError, lacks
from diffzoo.rng import key

__all__ = ["UNPUBLISHED", "Indices", "Mask", "Origin", "Record", "Source", "SubSource", "held_out", "ids_hash"]

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Record:
    """One row, undecoded.

    image:    the encoded image; None where the row has none.
    label:    class index, or None.
    captions: all texts of the image; training shows one per visit.
    name:     of the row, for messages.
    why:      the reason for a missing image, where it is known.
    """

    image: bytes | None
    label: int | None = None
    captions: tuple[str, ...] = ()
    name: str = ""
    why: str = ""


def rows_hash(parts: Iterable[object]) -> str:
    """A short hash that identifies the rows of a source; a run refuses to resume on other rows."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\x1e".encode())
    return digest.hexdigest()[:32]


def ids_hash(ids: Iterable[int]) -> str:
    """SHA-256 of rows in their order, each as eight bytes, little-endian."""
    return hashlib.sha256(np.fromiter(ids, dtype="<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where files come from.

    paths:    what they are called where they are published, so that a copy counts as the same; None: their paths below
              their common folder.
    revision: of the published data set, or "".
    licence:  as it states, or "".
    """

    paths: Sequence[str] | None = None
    revision: str = ""
    licence: str = ""

    def rows_hash(self, files: Sequence[str], prints: Iterable[str], *more: object) -> str:
        """The hash of the rows in files, by a print of each file."""
        return rows_hash([self.revision, *zip(self.paths or below_common_folder(files), prints, strict=True), *more])


UNPUBLISHED = Origin()


class Source:
    """A fixed list of rows.

    Attributes:
        name: for messages.
        block_sizes: rows of each block, `(blocks,)`.
        class_names: names of the classes; empty where rows have no label.
        has_captions: whether rows have texts.
        random_access: whether one row costs no more than its own bytes.
        remote: whether blocks come over a network.
        rows_hash: changes when the rows change.
        licence: as the source states it, or "".
        revision: of the published data set, or "".
        labels_from, captions_from: where they come from, for reports; "" where there are none.
    """

    name: str = ""
    block_sizes: Indices
    class_names: Sequence[str] = ()
    has_captions: bool = False
    random_access: bool = False
    remote: bool = False
    rows_hash: str = ""
    licence: str = ""
    revision: str = ""
    labels_from: str = ""
    captions_from: str = ""

    def say_as(self, other: "Source") -> None:
        """Say of these rows what another source says of all of its own."""
        for name in ("name", "class_names", "has_captions", "random_access", "remote", "licence", "revision"):
            setattr(self, name, getattr(other, name))
        self.labels_from, self.captions_from = other.labels_from, other.captions_from

    def __len__(self) -> int:
        return int(self.block_sizes.sum())

    @cached_property
    def starts(self) -> Indices:
        """Row at which each block begins, `(blocks + 1,)`."""
        return np.concatenate([[0], np.cumsum(self.block_sizes)])

    def locate(self, row: int) -> tuple[int, int]:
        """(block, row within it)."""
        block = int(np.searchsorted(self.starts, row, side="right") - 1)
        return block, row - int(self.starts[block])

    def read_block(self, block: int) -> Sequence[Record]:
        """The rows of one block. They may be made as they are asked for. Not called where `read_row` is overridden."""
        raise lacks(self, "read_block")

    def read_row(self, row: int) -> Record:
        """One row."""
        block, within = self.locate(row)
        return self.read_block(block)[within]

    def labels(self) -> Indices | None:
        """Class of every row `(rows,)`, without reading images; None where rows have no label.

        Raises:
            UserError: one row has none.
        """
        labels = self.label_values(range(len(self)))
        if labels is None:
            return None
        for row, label in enumerate(labels):
            if label is None:
                raise unlabelled(self.row_name(row), self.name)
        return np.array(labels, dtype=np.int64)

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        """Class of some rows, None for one that has none; None where no row has a label."""
        return None

    def row_name(self, row: int) -> str:
        """What a row is called in messages."""
        return f"row {row}"

    def row_names(self) -> Iterable[str]:
        """A name for each row that does not depend on the other rows."""
        return map(str, range(len(self)))

    def columns(self) -> list[str]:
        """What a row holds, for reports."""
        return ["image"] + ["label"] * bool(self.class_names) + ["caption"] * self.has_captions


class LazyRows(Sequence[Record]):
    """Rows that are made when asked for, one at a time."""

    def __init__(self, size: int, make: Callable[[int], Record]):
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self._make(index)


class SubSource(Source):
    """Some rows of another source, such as its training part.

    Args:
        base: the whole.
        keep: True for the rows to keep, `(rows,)`.
        part: name of the part, for messages and the fingerprint.
    """

    def __init__(self, base: Source, keep: Mask, part: str):
        self.base, self.part = base, part
        self.say_as(base)
        self.kept = np.flatnonzero(keep)
        of_block = np.searchsorted(base.starts, self.kept, side="right") - 1
        counts = np.bincount(of_block, minlength=len(base.block_sizes))
        self.blocks = np.flatnonzero(counts)
        self.block_sizes = counts[self.blocks].astype(np.int64)

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        return rows_hash([self.base.rows_hash, self.part, len(self.kept), self.kept.tobytes().hex()])

    def read_block(self, block: int) -> Sequence[Record]:
        records = self.base.read_block(int(self.blocks[block]))
        first = int(self.base.starts[self.blocks[block]])
        rows = self.kept[self.starts[block] : self.starts[block + 1]] - first
        return LazyRows(len(rows), lambda i: records[int(rows[i])])

    def read_row(self, row: int) -> Record:
        return self.base.read_row(int(self.kept[row]))

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        return self.base.label_values(int(self.kept[row]) for row in rows)

    def row_name(self, row: int) -> str:
        return self.base.row_name(int(self.kept[row]))

    def columns(self) -> list[str]:
        return self.base.columns()


def held_out(names: Iterable[str], fraction: float, labels: Indices | None = None) -> Mask:
    """Which rows are held out, by the hash of their names: it depends neither on the other rows nor on a seed.

    Two are held out at least, where there are four rows. Every class keeps a row to train on.

    Args:
        names: of the rows.
        fraction: what part of them.
        labels: class of each row, `(rows,)`.
    """
    drawn = np.array([key("held out", n) / 2**63 for n in names])
    out = drawn < fraction
    if not fraction or not len(drawn):
        return out
    classes = np.zeros(len(drawn), dtype=np.int64) if labels is None else labels
    left = np.bincount(classes[~out], minlength=int(classes.max()) + 1)
    emptied = np.flatnonzero(out & (left[classes] == 0))
    for row in emptied[np.argsort(-drawn[emptied], kind="stable")]:
        if not left[classes[row]]:
            out[row], left[classes[row]] = False, 1
    for row in np.argsort(drawn, kind="stable") if len(drawn) >= 4 and out.sum() < 2 else ():
        if not out[row] and left[classes[row]] > 1 and out.sum() < 2:
            out[row], left[classes[row]] = True, left[classes[row]] - 1
    return out


def unlabelled(row: str, source: str) -> UserError:
    """The error for a row without a label in a source that has labels."""
    where = row if source in row else f"{row or 'a row'} of {source}"
    return UserError(f"{where} has no label: leave such rows out, or set label to null to leave all labels out")


def below_common_folder(files: Sequence[str]) -> list[str]:
    """The paths of files below the folder that they share: the same on every machine. URLs stay what they are."""
    if any("://" in f for f in files):
        return list(files)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])
    return [Path(os.path.relpath(f, base)).as_posix() for f in files]
