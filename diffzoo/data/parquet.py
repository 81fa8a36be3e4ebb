"""Parquet files as a source: this disk or any file system that fsspec speaks, read by row group."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from diffzoo.data.remote import file_system, index_folder, retried
from diffzoo.data.sources import Record, Source, fingerprint, missing_column
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import write_text

__all__ = ["Columns", "ParquetSource"]

Indices = np.ndarray[Any, np.dtype[np.int64]]

RESIDENT_BYTES = 256 * 2**20  # local files up to this size are kept in memory and read in any order
OPEN_FILES = 8


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
        revision: of the published data set, if it is one.
        licence: as the source states it.
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Columns,
        name: str,
        class_names: Sequence[str] | None = None,
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
        self.class_names = self._classes(class_names)
        self.has_captions = columns.caption is not None
        self._select()
        self.fingerprint = fingerprint([*self._identity(), self._index["rows"], sorted(columns.where.items())])

    # ---- index

    def _identity(self) -> list[str]:
        """What identifies the files: their names below the common folder, and revision or sizes."""
        base = os.path.commonpath([os.path.dirname(f) for f in self.files]) if not self.remote else ""
        return [self.revision, *(os.path.relpath(f, base) if base else f for f in self.files)]

    def _path(self, file: int) -> str:
        return str(self._fs._strip_protocol(self.files[file]))

    def _footer(self, file: int) -> tuple[list[int], int]:
        metadata = retried(self.files[file], lambda: self._parquet(file), lambda: self._close(file)).metadata
        self._close(file)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        return [g.num_rows for g in groups], sum(g.total_byte_size for g in groups)

    def _build_index(self) -> dict[str, Any]:
        """Rows of every row group, and the size of all; kept on disk for remote files of a known revision."""
        path = index_folder() / f"{fingerprint(self._identity())}.json"
        if self.remote and self.revision and path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        with ThreadPoolExecutor(8) as pool:
            footers = list(pool.map(self._footer, range(len(self.files))))
        index = {"rows": [rows for rows, _ in footers], "bytes": sum(size for _, size in footers)}
        if self.remote and self.revision:
            write_text(path, json.dumps(index))
        return index

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """(file, row group) of every block that has rows."""
        every = [(f, g, n) for f, rows in enumerate(self._index["rows"]) for g, n in enumerate(rows)]
        return [(f, g) for f, g, n in every if n]

    @cached_property
    def _raw_sizes(self) -> Indices:
        return np.array([self._index["rows"][f][g] for f, g in self._groups], dtype=np.int64)

    # ---- columns

    @cached_property
    def _schema(self) -> Any:
        schema = retried(self.files[0], lambda: self._parquet(0), lambda: self._close(0)).schema_arrow
        self._close(0)
        return schema

    @cached_property
    def _features(self) -> Mapping[str, Any]:
        from datasets import Features

        features: Mapping[str, Any] = Features.from_arrow_schema(self._schema)
        return features

    def columns(self) -> list[str]:
        return list(self._schema.names)

    @staticmethod
    def columns_of(file: str) -> list[str]:
        """The columns of one file."""
        import pyarrow.parquet as pq

        system, _ = file_system(file)

        def read() -> list[str]:
            with system.open(file, "rb") as handle:
                return list(pq.read_schema(handle).names)

        return retried(file, read)

    def _check_columns(self) -> None:
        wanted = {"image": self.wanted.image, "label": self.wanted.label, "caption": self.wanted.caption}
        for kind, column in [*wanted.items(), *(("filter", w) for w in self.wanted.where)]:
            if column is not None and column not in self.columns():
                raise missing_column(kind, column, self.columns(), self.name)

    def _classes(self, given: Sequence[str] | None) -> list[str]:
        """Names of the classes. Labels that are texts are numbered in alphabetical order."""
        from datasets import ClassLabel

        column = self.wanted.label
        if column is None:
            return []
        feature = self._features[column]
        self._texts = None
        if isinstance(feature, ClassLabel):
            return list(given or feature.names)
        values = self._light(column)
        if len(values) and isinstance(values[0], str):
            names = list(given) if given else sorted(set(values))
            self._texts = {n: i for i, n in enumerate(names)}
            unknown = sorted(set(values) - set(names))
            if unknown:
                raise UserError(f"{self.name} has a class {unknown[0]!r}{did_you_mean(unknown[0], names)}")
            return names
        top = max((int(v) for v in values if v is not None), default=-1)
        return list(given) if given else [str(i) for i in range(top + 1)]

    def _light(self, column: str) -> list[Any]:
        """Every value of a small column, in the order of all rows."""
        tables = [self._table(block, [column]) for block in range(len(self._groups))]
        return [value for table in tables for value in table[column].to_pylist()]

    def _select(self) -> None:
        """Apply `where`."""
        self._kept: list[Indices] | None = None
        self.block_sizes = self._raw_sizes
        if not self.wanted.where:
            return
        keep = np.ones(int(self._raw_sizes.sum()), dtype=bool)
        for column, value in self.wanted.where.items():
            keep &= np.array([v == value for v in self._light(column)], dtype=bool)
        if not keep.any():
            rule = ", ".join(f"{k} = {v!r}" for k, v in self.wanted.where.items())
            raise UserError(f"no row of {self.name} has {rule}")
        parts = np.split(keep, np.cumsum(self._raw_sizes)[:-1])
        blocks = [b for b, part in enumerate(parts) if part.any()]
        self._groups = [self._groups[b] for b in blocks]
        self._kept = [np.flatnonzero(parts[b]) for b in blocks]
        self.block_sizes = np.array([len(k) for k in self._kept], dtype=np.int64)

    def labels(self) -> Indices | None:
        if self.wanted.label is None:
            return None
        values: list[int] = []
        for block in range(len(self._groups)):
            column = self._table(block, [self.wanted.label])[self.wanted.label].to_pylist()
            kept = range(len(column)) if self._kept is None else self._kept[block]
            values += [self._class_index(column[i]) for i in kept]
        return np.array(values, dtype=np.int64)

    def _class_index(self, value: Any) -> int:
        index = self._texts[value] if self._texts is not None else int(value)
        if not 0 <= index < len(self.class_names):
            raise UserError(f"{self.name} has a label {index}, but {len(self.class_names)} classes")
        return index

    # ---- reading

    def _parquet(self, file: int) -> Any:
        import pyarrow.parquet as pq

        if os.getpid() != self._owner:  # open files do not survive a fork
            self._open, self._owner = {}, os.getpid()
        key = (threading.get_ident(), file)
        if key not in self._open:
            mine = [f for thread, f in list(self._open) if thread == key[0]]
            for other in mine[: max(0, len(mine) - OPEN_FILES + 1)]:
                self._close(other)
            handle = self._fs.open(self._path(file), "rb")
            self._open[key] = pq.ParquetFile(handle, pre_buffer=self.remote)
            self._check_unchanged(file, self._open[key].metadata)
        return self._open[key]

    def _check_unchanged(self, file: int, metadata: Any) -> None:
        """A file must be the one that was indexed."""
        index = getattr(self, "_index", None)
        if index and [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] != index["rows"][file]:
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
        return retried(
            self.files[file],
            lambda: self._parquet(file).read_row_group(group, columns=list(columns)),
            lambda: self._close(file),
        )

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


class _Rows(Sequence[Record]):
    """The rows of one row group, taken out of the Arrow table as they are asked for."""

    def __init__(self, source: ParquetSource, block: int, table: Any):
        wanted = source.wanted
        self._source, self._block = source, block
        self._file = source.files[source._groups[block][0]]
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
            f"{self._file} row {at} of row group {self._source._groups[self._block][1]}",
        )


def _encoded(column: Any) -> Any:
    """The bytes of a picture column, which is a struct of bytes and path, or bytes alone."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], type=column.type.field("bytes").type)
