"""Where rows come from: a folder of pictures, Parquet files, tar shards; on this disk or on a server.

A source is a fixed list of rows in *blocks*. What is read together is one block; a source with random access reads any
row alone. Nothing is decoded here.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffzoo.errors import UserError, did_you_mean
from diffzoo.rng import key

__all__ = ["FolderSource", "Record", "Source", "SubSource", "fingerprint"]

Indices = np.ndarray[Any, np.dtype[np.int64]]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})


@dataclass(frozen=True, slots=True)
class Record:
    """One row, undecoded.

    image:    the encoded picture; None where the row has none.
    label:    class index, or None.
    captions: all texts of the picture; training shows one per visit.
    name:     what to call the row in a message.
    """

    image: bytes | None
    label: int | None = None
    captions: tuple[str, ...] = ()
    name: str = ""


def fingerprint(parts: Iterable[object]) -> str:
    """A short hash of what identifies a source; a run refuses to resume on a source with another one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\x1e".encode())
    return digest.hexdigest()[:32]


class Source:
    """A fixed list of rows.

    Attributes:
        name: for messages.
        block_sizes: rows of each block, `(blocks,)`.
        class_names: names of the classes; empty where rows have no label.
        has_captions: whether rows have texts.
        random_access: whether one row costs no more than its own bytes.
        remote: whether blocks come over a network.
        fingerprint: changes when the rows change.
        licence: as the source states it, or "".
        revision: of the published data set, or "".
    """

    name: str = ""
    block_sizes: Indices
    class_names: Sequence[str] = ()
    has_captions: bool = False
    random_access: bool = False
    remote: bool = False
    fingerprint: str = ""
    licence: str = ""
    revision: str = ""

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
        """The rows of one block. They may be made as they are asked for."""
        raise NotImplementedError

    def read_row(self, row: int) -> Record:
        """One row."""
        block, within = self.locate(row)
        return self.read_block(block)[within]

    def labels(self) -> Indices | None:
        """Class of every row `(rows,)`, without reading pictures; None where rows have no label."""
        return None

    def columns(self) -> list[str]:
        """What a row holds, for reports."""
        return ["image"] + ["label"] * bool(self.class_names) + ["caption"] * self.has_captions


class FolderSource(Source):
    """Pictures below a folder; the first level of sub-folders, if any, are the classes.

    A text file of the same name beside a picture (`cat.txt` beside `cat.jpg`) holds its captions, one per line.

    Args:
        path: the folder.
        classes: True: sub-folders are classes; False: they are not; None: they are if there are any.

    Raises:
        UserError: no such folder, no pictures in it, pictures beside class folders.
    """

    random_access = True

    def __init__(self, path: str | os.PathLike[str], classes: bool | None = None):
        self.root = Path(path)
        self.name = str(path)
        if not self.root.is_dir():
            raise UserError(f"no folder {str(path)!r}: give the folder that holds the pictures")
        files = self._pictures()
        if not files:
            raise UserError(f"no pictures below {str(path)!r}: expected files ending in {', '.join(sorted(SUFFIXES))}")
        stray = [f for f in files if "/" not in f]
        if classes is None:
            classes = len(stray) < len(files)
        if classes and stray:
            raise UserError(
                f"{len(stray)} pictures lie in {str(path)!r} beside its class folders, {stray[0]!r} first: "
                "move them into one, or set classes to false"
            )
        self.files = files
        self.class_names = sorted({f.split("/")[0] for f in files}) if classes else []
        self._class = {c: i for i, c in enumerate(self.class_names)}
        self.block_sizes = np.array([len(files)], dtype=np.int64)
        self.has_captions = (self.root / files[0]).with_suffix(".txt").is_file()

    def _pictures(self) -> list[str]:
        found = []
        for folder, inner, names in os.walk(self.root, followlinks=True):
            inner[:] = sorted(d for d in inner if not d.startswith("."))
            base = Path(folder).relative_to(self.root)
            found += [
                (base / n).as_posix() for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")
            ]
        return sorted(found)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint((f, (self.root / f).stat().st_size) for f in self.files)

    def _label(self, file: str) -> int | None:
        return self._class[file.split("/")[0]] if self.class_names else None

    def read_row(self, row: int) -> Record:
        path = self.root / self.files[row]
        captions: tuple[str, ...] = ()
        if self.has_captions:
            text = path.with_suffix(".txt")
            lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
            captions = tuple(line.strip() for line in lines if line.strip()) or ("",)
        try:
            data = path.read_bytes()
        except OSError:
            data = None
        return Record(data, self._label(self.files[row]), captions, str(path))

    def read_block(self, block: int) -> Sequence[Record]:
        return _Lazy(len(self), self.read_row)

    def labels(self) -> Indices | None:
        if not self.class_names:
            return None
        return np.array([self._class[f.split("/")[0]] for f in self.files], dtype=np.int64)


class _Lazy(Sequence[Record]):
    """Rows that are made when asked for."""

    def __init__(self, size: int, make: Callable[[int], Record]):
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return self._make(index)


class SubSource(Source):
    """Some rows of another source, such as its training part.

    Args:
        base: the whole.
        keep: True for the rows to keep, `(rows,)`.
        part: name of the part, for messages and the fingerprint.
    """

    def __init__(self, base: Source, keep: np.ndarray[Any, np.dtype[np.bool_]], part: str):
        self.base, self.part = base, part
        self.name = base.name
        self.kept = np.flatnonzero(keep)
        of_block = np.searchsorted(base.starts, self.kept, side="right") - 1
        counts = np.bincount(of_block, minlength=len(base.block_sizes))
        self.blocks = np.flatnonzero(counts)
        self.block_sizes = counts[self.blocks].astype(np.int64)
        self.class_names, self.has_captions = base.class_names, base.has_captions
        self.random_access, self.remote = base.random_access, base.remote
        self.licence, self.revision = base.licence, base.revision

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint([self.base.fingerprint, self.part, len(self.kept), self.kept.tobytes().hex()])

    def read_block(self, block: int) -> Sequence[Record]:
        records = self.base.read_block(int(self.blocks[block]))
        first = int(self.base.starts[self.blocks[block]])
        rows = self.kept[self.starts[block] : self.starts[block + 1]] - first
        return _Lazy(len(rows), lambda i: records[int(rows[i])])

    def read_row(self, row: int) -> Record:
        return self.base.read_row(int(self.kept[row]))

    def labels(self) -> Indices | None:
        labels = self.base.labels()
        return None if labels is None else labels[self.kept]

    def columns(self) -> list[str]:
        return self.base.columns()


def held_out(names: Iterable[str], fraction: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are held out: by the hash of their names, so that it does not depend on the others or on a seed."""
    return np.array([key("held out", n) / 2**63 < fraction for n in names], dtype=bool)


def missing_column(kind: str, name: str, known: Sequence[str], where: str) -> UserError:
    """The error for a column that is not there; lists those that are."""
    return UserError(
        f"no {kind} column {name!r} in {where}; its columns are {', '.join(known)}{did_you_mean(name, known)}"
    )
