"""Parquet files as a source: this disk or any file system that fsspec speaks, read by row group."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffzoo.data.remote import file_system, index_folder, retried
from diffzoo.data.sources import (
    Record,
    Source,
    below_common_folder,
    missing_column,
    number_classes,
    rows_hash,
    unlabelled,
)
from diffzoo.errors import UserError
from diffzoo.files import write_text

__all__ = ["Columns", "ParquetSource"]

Indices = np.ndarray[Any, np.dtype[np.int64]]
Value = TypeVar("Value")

RESIDENT_BYTES = 256 * 2**20  # local files up to this size are kept in memory and read in any order
OPEN_FILES = 8
FOOTER_GUESS = 64 * 2**10  # bytes that hold most footers
LIGHT_READS = 16  # files of which a small column is read at the same time
SPARSE = 2**20  # bytes per row group above which a small column is read piece by piece
INDEX_FORMAT = 2


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    image:   encoded pictures (Hugging Face `Image` or bytes).
    label:   class indices or class names; None for no labels.
    caption: one text or a list of texts; None for no captions.
    where:   keep only rows whose column has this value, such as {"split": "train"}.
    """

    image: str = "image"
    label: str | None = None
    caption: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


class ParquetSource(Source):
    """Rows of Parquet files; a block is a row group.

    Args:
        files: paths or URLs, in order.
        columns: which column holds what.
        name: for messages.
        class_names: names of the classes; None: as the files say (a `ClassLabel`), or the distinct values.
        like: names of the classes of the training rows, by which these rows are numbered.
        paths: what the files are called where they are published, so that a copy counts as the same; None: their
            paths below their common folder.
        revision: of the published data set, if it is one.
        licence: as the source states it.

    Raises:
        UserError: a file is damaged or lacks a column, no row is kept, a class is not among `class_names` or `like`.
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Columns,
        name: str,
        class_names: Sequence[str] | None = None,
        like: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        revision: str = "",
        licence: str = "",
    ):
        if not files:
            raise UserError(f"{name} has no Parquet files")
        self.files, self.wanted, self.name = list(files), columns, name
        self.revision, self.licence = revision, licence
        self._fs, self.remote = file_system(self.files[0])
        self._open: dict[tuple[int, int], Any] = {}  # by thread and file: a file in use is closed by nobody else
        self._resident: dict[int, Any] = {}
        self._owner = os.getpid()
        self._index = self._build_index()
        self.random_access = not self.remote and self._index["bytes"] <= RESIDENT_BYTES
        self._check_columns()
        self.class_names = self._classes(class_names, like)
        self.has_captions = columns.caption is not None
        self._select()
        known = zip(paths or below_common_folder(self.files), self._index["prints"], strict=True)
        self.rows_hash = rows_hash([revision, *known, self._index["rows"], sorted(columns.where.items())])

    # ---- index

    def _path(self, file: int) -> str:
        return str(self._fs._strip_protocol(self.files[file]))

    def _footer(self, file: int) -> dict[str, Any]:
        metadata, printed = self._metadata(file)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        return {
            "rows": [g.num_rows for g in groups],
            "bytes": sum(g.total_byte_size for g in groups),
            "columns": list(metadata.schema.to_arrow_schema().names),
            "prints": printed,
        }

    def _metadata(self, file: int) -> tuple[Any, str]:
        """See `_read_footer`."""

        def read() -> tuple[Any, str]:
            with self._opened(file) as handle:
                return _read_footer(self.files[file], handle)

        return self._reading(file, read)

    def _kept_index(self, *what: str) -> Path | None:
        """Where something about all files is kept on disk; None for files that may change."""
        if not (self.remote and self.revision):
            return None
        return index_folder() / f"{rows_hash([INDEX_FORMAT, self.revision, *self.files, *what])}.json"

    def _build_index(self) -> dict[str, Any]:
        """Row groups, columns and a fingerprint of every file; kept on disk for remote files of a known revision."""
        path = self._kept_index()
        if path is not None and path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        with ThreadPoolExecutor(8) as pool:
            footers = list(pool.map(self._footer, range(len(self.files))))
        index: dict[str, Any] = {what: [f[what] for f in footers] for what in ("rows", "columns", "prints")}
        index["bytes"] = sum(f["bytes"] for f in footers)
        if path is not None:
            write_text(path, json.dumps(index))
        return index

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """(file, row group) of every block that has rows."""
        every = [(f, g, n) for f, rows in enumerate(self._index["rows"]) for g, n in enumerate(rows)]
        return [(f, g) for f, g, n in every if n]

    # ---- columns

    @cached_property
    def _schema(self) -> Any:
        return self._metadata(0)[0].schema.to_arrow_schema()

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        from datasets import Features

        features: Mapping[str, Any] = Features.from_arrow_schema(self._schema)
        return features

    def columns(self) -> list[str]:
        return list(self._index["columns"][0])

    @staticmethod
    def columns_of(file: str) -> list[str]:
        """The columns of one file."""
        system, remote = file_system(file)

        def read() -> list[str]:
            with system.open(file, "rb") as handle:
                return list(_read_footer(file, handle)[0].schema.to_arrow_schema().names)

        return _explained(file, lambda: retried(file, read, remote=remote))

    def _check_columns(self) -> None:
        wanted = {"image": self.wanted.image, "label": self.wanted.label, "caption": self.wanted.caption}
        for file, known in enumerate(self._index["columns"]):
            where = f"{self.name}, file {self.files[file]}" if file else self.name
            for kind, column in [*wanted.items(), *(("filter", w) for w in self.wanted.where)]:
                if column is not None and column not in known:
                    raise missing_column(kind, column, known, where)

    def _classes(self, given: Sequence[str] | None, like: Sequence[str] | None) -> list[str]:
        """Names of the classes, and the number of every label that is not its own number."""
        import pyarrow as pa
        from datasets import ClassLabel

        column = self.wanted.label
        self._numbers: dict[Any, int] | None = None
        if column is None:
            return []
        feature = self._features[column]
        if isinstance(feature, ClassLabel):
            if not given and like is not None and list(feature.names) != list(like):
                names, numbers = number_classes(feature.names, like, self.name)
                self._numbers = {i: (numbers or {})[n] for i, n in enumerate(feature.names)}
                return names
            return list(given or feature.names)
        if (given or like) and pa.types.is_integer(self._schema.field(column).type):
            return list(given or like or [])
        names, self._numbers = number_classes(self._light(column), given or like, self.name)
        return names

    def _light(self, column: str) -> list[Any]:
        """Every value of a small column, in the order of all rows of all files; kept on disk as the index is."""
        path = self._kept_index(column)
        if path is not None and path.is_file():
            kept: list[Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        with ThreadPoolExecutor(LIGHT_READS if self.remote else 1) as pool:
            parts = list(pool.map(lambda file: self._light_of(file, column), range(len(self.files))))
        values = [value for part in parts for value in part]
        if path is not None:
            with contextlib.suppress(TypeError):  # values that JSON does not know are read each time
                write_text(path, json.dumps(values))
        return values

    def _light_of(self, file: int, column: str) -> list[Any]:
        import pyarrow.parquet as pq

        sizes = self._index["rows"][file]
        if not sum(sizes):
            return []
        metadata, _ = self._metadata(file)
        spacing = max(metadata.row_group(g).total_byte_size for g in range(len(sizes)))
        # between the values lie pictures: what is fetched ahead takes them along, so large ones are jumped over
        settings = {"cache_type": "none"} if self.remote and spacing > SPARSE else {}

        def read() -> list[Any]:
            with self._opened(file, **settings) as handle:
                opened = pq.ParquetFile(handle, metadata=metadata, pre_buffer=False)
                return list(opened.read_row_groups(range(len(sizes)), [column], use_threads=False)[column].to_pylist())

        return self._reading(file, read)

    def _select(self) -> None:
        """Apply `where`."""
        self._kept: list[Indices] | None = None
        self._mask: np.ndarray[Any, np.dtype[np.bool_]] | None = None
        raw_sizes = np.array([self._index["rows"][f][g] for f, g in self._groups], dtype=np.int64)
        self.block_sizes = raw_sizes
        if not self.wanted.where:
            return
        keep = np.ones(int(raw_sizes.sum()), dtype=bool)
        for column, value in self.wanted.where.items():
            keep &= np.array([v == value for v in self._light(column)], dtype=bool)
        if not keep.any():
            rule = ", ".join(f"{k} = {v!r}" for k, v in self.wanted.where.items())
            raise UserError(f"no row of {self.name} has {rule}")
        parts = np.split(keep, np.cumsum(raw_sizes)[:-1])
        blocks = [b for b, part in enumerate(parts) if part.any()]
        self._groups = [self._groups[b] for b in blocks]
        self._kept, self._mask = [np.flatnonzero(parts[b]) for b in blocks], keep
        self.block_sizes = np.array([len(k) for k in self._kept], dtype=np.int64)

    def labels(self) -> Indices | None:
        if self.wanted.label is None:
            return None
        values = self._light(self.wanted.label)
        kept = values if self._mask is None else [values[row] for row in np.flatnonzero(self._mask)]
        for row, value in enumerate(kept):
            if value is None:
                raise unlabelled(self._row_name(*self.locate(row)), self.name)
        return np.array([self._class_index(value) for value in kept], dtype=np.int64)

    def _row_name(self, block: int, within: int) -> str:
        file, group = self._groups[block]
        at = within if self._kept is None else int(self._kept[block][within])
        return f"{self.files[file]} row {at} of row group {group}"

    def _class_index(self, value: Any) -> int:
        try:
            index = int(value) if self._numbers is None else self._numbers[value]
        except (ValueError, KeyError):
            raise UserError(f"{self.name} has a label {value!r}, which is neither a class nor its number") from None
        if not 0 <= index < len(self.class_names):
            raise UserError(f"{self.name} has a label {index}, but {len(self.class_names)} classes")
        return index

    # ---- reading

    def _reading(self, file: int, action: Callable[[], Value]) -> Value:
        """`action()` on a file, again where that may help, with errors as sentences."""
        name = self.files[file]
        return _explained(name, lambda: retried(name, action, lambda: self._close(file), self.remote))

    def _opened(self, file: int, **settings: Any) -> Any:
        return self._fs.open(self._path(file), "rb", **settings)

    def _parquet(self, file: int) -> Any:
        import pyarrow.parquet as pq

        if os.getpid() != self._owner:  # open files do not survive a fork
            self._open, self._owner = {}, os.getpid()
        key = (threading.get_ident(), file)
        if key not in self._open:
            mine = [f for thread, f in list(self._open) if thread == key[0]]
            for other in mine[: max(0, len(mine) - OPEN_FILES + 1)]:
                self._close(other)
            handle = self._opened(file)
            metadata, printed = _read_footer(self.files[file], handle)
            self._check_unchanged(file, printed)
            self._open[key] = pq.ParquetFile(handle, metadata=metadata, pre_buffer=self.remote)
        return self._open[key]

    def _check_unchanged(self, file: int, printed: str) -> None:
        """A file must be the one that was indexed."""
        index = getattr(self, "_index", None)
        if index and printed != index["prints"][file]:
            raise UserError(
                f"{self.files[file]} has changed since it was indexed, so positions have no meaning in it: "
                f"pin a revision, or delete {index_folder()} to begin anew"
            )

    def _close(self, file: int) -> None:
        opened = self._open.pop((threading.get_ident(), file), None)
        if opened is not None:
            opened.close(force=True)

    def _table(self, block: int, columns: Sequence[str]) -> Any:
        file, group = self._groups[block]
        return self._reading(file, lambda: self._parquet(file).read_row_group(group, columns=list(columns)))

    def read_block(self, block: int) -> Sequence[Record]:
        if block in self._resident:
            kept: Sequence[Record] = self._resident[block]
            return kept
        names = [n for n in (self.wanted.image, self.wanted.label, self.wanted.caption) if n]
        rows = _Rows(self, block, self._table(block, names))
        if self.random_access:
            self._resident[block] = rows
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_resident": {}}


def _read_footer(name: str, handle: Any) -> tuple[Any, str]:
    """(metadata, fingerprint) of an open file.

    The fingerprint is the size and the hash of the footer, which holds where every column of every row group lies, how
    large it is and its extremes: it changes with the rows, and a copy elsewhere has the same.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = handle.seek(0, os.SEEK_END)

    def last(count: int) -> bytes:
        handle.seek(max(0, size - count))
        return bytes(handle.read(count))

    tail = last(FOOTER_GUESS)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if size < 12 or tail[-4:] != b"PAR1" or length > size:
        what = "is empty" if not size else "is truncated or no Parquet file"
        raise UserError(f"{name} {what} ({size} bytes): write or fetch it again")
    footer = tail[-length:] if length <= len(tail) else last(length)
    return pq.read_metadata(pa.BufferReader(footer)), f"{size}-{hashlib.sha256(footer).hexdigest()[:32]}"


def _explained(name: str, action: Callable[[], Value]) -> Value:
    """`action()`, with a damaged or unreadable file as a sentence."""
    import pyarrow as pa

    try:
        return action()
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):  # Arrow's own
            raise UserError(f"{name} is damaged ({text}): write or fetch it again") from error
        raise UserError(f"cannot read {name} ({type(error).__name__}: {text}): restore it") from error


class _Rows(Sequence[Record]):
    """The rows of one row group, taken out of the Arrow table as they are asked for."""

    def __init__(self, source: ParquetSource, block: int, table: Any):
        wanted = source.wanted
        self._source, self._block = source, block
        self._kept = None if source._kept is None else source._kept[block]
        self._image = _encoded(table[wanted.image])
        self._label = table[wanted.label].to_pylist() if wanted.label else None
        self._caption = table[wanted.caption].to_pylist() if wanted.caption else None

    def __len__(self) -> int:
        return int(self._source.block_sizes[self._block])

    def __getitem__(self, index: Any) -> Any:
        at = index if self._kept is None else int(self._kept[index])
        image = self._image[at].as_py()
        label = self._label[at] if self._label is not None else None
        captions = self._caption[at] if self._caption is not None else ()
        texts = (captions,) if isinstance(captions, str) else tuple(captions or ("",))
        return Record(
            image,
            None if label is None else self._source._class_index(label),
            texts if self._caption is not None else (),
            self._source._row_name(self._block, index),
        )


def _encoded(column: Any) -> Any:
    """The bytes of a picture column, which is a struct of bytes and path, or bytes alone."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], type=column.type.field("bytes").type)
