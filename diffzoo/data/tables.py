"""Tables as a source: Parquet files by row group, or Arrow tables that were saved to disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from diffzoo.data.metadata import (
    AUTO,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEXT_FIELDS,
    Classes,
    caption_texts,
    missing_column,
    pick,
)
from diffzoo.data.parquet import ArrowFiles, ParquetFiles, class_names
from diffzoo.data.sources import Indices, LazyRows, Mask, Record, Source, below_common_folder, label_array, rows_hash
from diffzoo.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "TableSource"]

RESIDENT_BYTES = 256 * 2**20  # local files up to this size are kept in memory and read in any order


@dataclass(frozen=True)
class Columns:
    """Which column holds what; "auto" finds the usual names, and for images the only column that holds some.

    image:   encoded images (Hugging Face `Image` or bytes).
    label:   class indices or class names; None for no labels.
    caption: one text or a list of texts; None for no captions.
    where:   keep only rows whose column has this value, such as {"split": "train"}.
    """

    image: str = "image"
    label: str | None = None
    caption: str | None = None
    where: Mapping[str, object] = field(default_factory=dict)


class TableSource(Source):
    """Rows of tables; a block is a row group.

    Args:
        files: paths or URLs, in order.
        columns: which column holds what.
        name: for messages.
        class_names: names of the classes; None: as the files say (a `ClassLabel`), or the distinct values.
        stated: names of the classes by label column, as the data set says beside its files.
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
        stated: Mapping[str, Sequence[str]] | None = None,
        like: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        revision: str = "",
        licence: str = "",
    ):
        if not files:
            raise UserError(f"{name} has no Parquet files")
        self.name, self.revision, self.licence = name, revision, licence
        self.reader = ArrowFiles(files) if files[0].endswith(".arrow") else ParquetFiles(files, revision)
        self.files, self.remote, self._index = self.reader.files, self.reader.remote, self.reader.index
        self._resident: dict[int, Sequence[Record]] = {}
        self.random_access = not self.remote and sum(f["bytes"] for f in self._index) <= RESIDENT_BYTES
        self.wanted = columns = self._chosen(columns)
        self._check_columns()
        if columns.label is not None:
            self._classes = self._classes_of(columns.label, class_names or (stated or {}).get(columns.label), like)
            self.class_names = self._classes.names
        self.has_captions = columns.caption is not None
        self.labels_from = f"the column {columns.label}" if columns.label else ""
        self.captions_from = f"the column {columns.caption}" if columns.caption else ""
        self._select()
        known = zip(paths or below_common_folder(self.files), (f["prints"] for f in self._index), strict=True)
        self.rows_hash = rows_hash([revision, *known, [f["rows"] for f in self._index], sorted(columns.where.items())])

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """(file, row group) of every block that has rows."""
        every = [(f, g, n) for f, footer in enumerate(self._index) for g, n in enumerate(footer["rows"])]
        return [(f, g) for f, g, n in every if n]

    def columns(self) -> list[str]:
        return list(self._index[0]["columns"])

    def _chosen(self, wanted: Columns) -> Columns:
        """The columns, by their names."""
        schema = self.reader.schema
        image = wanted.image
        if image == AUTO:
            holding = [name for name in schema.names if _holds_images(schema.field(name).type)]
            image = pick(AUTO, IMAGE_COLUMNS, holding) or pick(AUTO, IMAGE_COLUMNS, schema.names) or "image"
            image = holding[0] if len(holding) == 1 else image
        label = pick(wanted.label, LABEL_COLUMNS, schema.names)
        return replace(wanted, image=image, label=label, caption=pick(wanted.caption, CAPTION_COLUMNS, schema.names))

    def _check_columns(self) -> None:
        wanted = {"image": self.wanted.image, "label": self.wanted.label, "caption": self.wanted.caption}
        for file, known in enumerate(footer["columns"] for footer in self._index):
            where = f"{self.name}, file {self.files[file]}" if file else self.name
            for kind, column in [*wanted.items(), *(("filter", w) for w in self.wanted.where)]:
                if column is not None and column not in known:
                    raise missing_column(kind, column, known, where)
        for kind in ("image", "caption"):
            column = wanted[kind]
            type_ = None if column is None else self.reader.schema.field(column).type
            if type_ is not None and not (_holds_images if kind == "image" else _holds_texts)(type_):
                texts = kind == "image" and _holds_texts(type_)
                told = "paths, URLs or base64 texts" if texts else f"values of the type {type_}"
                raise UserError(
                    f"the {kind} column {column!r} of {self.name} holds {told}, and no {_MEANT[kind]}: choose another "
                    f"column, or write it anew"
                )

    def _classes_of(self, column: str, given: Sequence[str] | None, like: Sequence[str] | None) -> Classes:
        import pyarrow as pa

        stored, type_ = class_names(self.reader.schema).get(column), self.reader.schema.field(column).type
        if stored and pa.types.is_int64(type_):  # what `datasets` takes for a `ClassLabel`
            self._check_class_names(column)
            if not given and like is not None and stored != list(like):
                known = Classes.of(stored, like, self.name)
                return replace(known, numbers={i: (known.numbers or {})[n] for i, n in enumerate(stored)})
            return Classes(list(given or stored), None, self.name)
        named = (given or like) and pa.types.is_integer(type_)
        return Classes.of(() if named else self.reader.column(column), given or like, self.name)

    def _check_class_names(self, column: str) -> None:
        """The numbers of a later file mean what those of the first do; `datasets` takes them as if they did."""
        first = self._index[0]["classes"][column]
        for file, footer in zip(self.files, self._index, strict=True):
            if footer["classes"].get(column, first) != first:
                raise UserError(
                    f"{file} has other names or another order of classes in the column {column!r} than "
                    f"{self.files[0]}: write both with the same names, or give one of them alone"
                )

    def _select(self) -> None:
        """Apply `where`."""
        self._kept: list[Indices] | None = None
        self._mask: Mask | None = None
        raw_sizes = np.array([self._index[f]["rows"][g] for f, g in self._groups], dtype=np.int64)
        self.block_sizes = raw_sizes
        if not self.wanted.where:
            return
        keep = np.ones(int(raw_sizes.sum()), dtype=bool)
        for column, value in self.wanted.where.items():
            keep &= np.array([v == value for v in self.reader.column(column)], dtype=bool)
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
        values = self.reader.column(self.wanted.label)
        kept = values if self._mask is None else [values[row] for row in np.flatnonzero(self._mask)]
        found = [self._classes.index(value) for value in kept]
        return label_array(found, lambda row: self._row_name(*self.locate(row)), self.name)

    def _row_name(self, block: int, within: int) -> str:
        file, group = self._groups[block]
        at = within if self._kept is None else int(self._kept[block][within])
        return f"{self.files[file]} row {at} of row group {group}"

    def read_block(self, block: int) -> Sequence[Record]:
        if block in self._resident:
            return self._resident[block]
        wanted, kept = self.wanted, None if self._kept is None else self._kept[block]
        names = [n for n in (wanted.image, wanted.label, wanted.caption) if n]
        table = self.reader.table(*self._groups[block], names)
        image, path = _encoded(table[wanted.image])
        label = table[wanted.label].to_pylist() if wanted.label else None
        caption = table[wanted.caption].to_pylist() if wanted.caption else None

        def record(index: int) -> Record:
            at = index if kept is None else int(kept[index])
            data = image[at].as_py()
            alone = path[at].as_py() if data is None and path is not None else None
            return Record(
                data,
                None if label is None else self._classes.index(label[at]),
                () if caption is None else caption_texts(caption[at], self.name),
                self._row_name(block, index),
                f"the row holds the path {alone!r} alone: `save_to_disk` of `datasets` stores images" if alone else "",
            )

        rows = LazyRows(int(self.block_sizes[block]), record)
        if self.random_access:
            self._resident[block] = rows
        return rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resident": {}}


def _encoded(column: "pa.ChunkedArray") -> "tuple[pa.ChunkedArray, pa.ChunkedArray | None]":
    """(the bytes, the paths or None) of an image column, which is a struct of both, or bytes alone."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column, None
    names = [column.type.field(i).name for i in range(column.type.num_fields)]
    fields = {
        name: pa.chunked_array([chunk.field(name) for chunk in column.chunks], type=column.type.field(name).type)
        for name in ("bytes", "path")
        if name in names
    }
    return fields["bytes"], fields.get("path")


_MEANT = {"image": "encoded images (bytes, or `Image` of `datasets`)", "caption": "texts"}


def _holds_images(type_: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(type_):
        return any(type_.field(i).name == "bytes" for i in range(type_.num_fields))
    return "binary" in str(type_) and "list" not in str(type_).partition("<")[0]


def _holds_texts(type_: "pa.DataType") -> bool:
    """Whether values of an Arrow type are captions: texts, structs with one, or lists of these."""
    import pyarrow as pa

    if "list" in str(type_).partition("<")[0] or pa.types.is_dictionary(type_):
        return _holds_texts(type_.value_type)
    if pa.types.is_struct(type_):
        fields = {type_.field(i).name: type_.field(i).type for i in range(type_.num_fields)}
        return any(_holds_texts(fields[f]) for f in TEXT_FIELDS if f in fields)
    return str(type_) in ("string", "large_string", "string_view", "null")
