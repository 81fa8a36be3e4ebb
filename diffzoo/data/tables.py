"""Tables as a source: Parquet files by row group, or Arrow tables that were saved to disk."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from diffzoo.data.metadata import AUTO, IMAGE_COLUMNS, TEXT_FIELDS, Classes, Columns, caption_texts, check_column, pick
from diffzoo.data.parquet import ArrowFiles, ParquetFiles, class_names
from diffzoo.data.sources import UNPUBLISHED, LazyRows, Origin, Record, Source, SubSource
from diffzoo.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TableSource", "rows_with"]

RESIDENT_BYTES = 256 * 2**20  # local files up to this size are kept in memory and read in any order


class TableSource(Source):
    """Rows of tables; a block is a row group.

    Args:
        files: paths or URLs, in order.
        columns: which column holds what.
        name: for messages.
        class_names: names of the classes; None: as the files say (a `ClassLabel`), or the distinct values.
        stated: names of the classes by label column, as the data set says beside its files.
        like: names of the classes of the training rows, by which these rows are numbered.
        origin: where the files come from.

    Raises:
        UserError: a file is damaged or lacks a column, or a class is not among `class_names` or `like`.
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Columns,
        name: str,
        class_names: Sequence[str] | None = None,
        stated: Mapping[str, Sequence[str]] | None = None,
        like: Sequence[str] | None = None,
        origin: Origin = UNPUBLISHED,
    ):
        self.name, self.origin, self.revision, self.licence = name, origin, origin.revision, origin.licence
        self.reader = ArrowFiles(files) if files[0].endswith(".arrow") else ParquetFiles(files, origin.revision)
        self.files, self.remote, self._index = self.reader.files, self.reader.remote, self.reader.index
        self._resident: dict[int, Sequence[Record]] = {}
        self.random_access = not self.remote and sum(f["bytes"] for f in self._index) <= RESIDENT_BYTES
        columns = columns.among(self.reader.schema.names)
        self.wanted = columns = replace(columns, image=self._image_column(columns.image))
        self._check_columns()
        if columns.label is not None:
            self._classes = self._classes_of(columns.label, class_names or (stated or {}).get(columns.label), like)
            self.class_names = self._classes.names
        self.has_captions = columns.caption is not None
        self.labels_from = f"the column {columns.label}" if columns.label else ""
        self.captions_from = f"the column {columns.caption}" if columns.caption else ""
        groups = [(f, g, n) for f, footer in enumerate(self._index) for g, n in enumerate(footer["rows"]) if n]
        self._groups = [(f, g) for f, g, _ in groups]  # file and row group of every block
        self.block_sizes = np.array([n for _, _, n in groups], dtype=np.int64)
        self.rows_hash = self.hash_with({})

    def columns(self) -> list[str]:
        return list(self._index[0]["columns"])

    def _image_column(self, wanted: str) -> str:
        """The column of images by its name."""
        names, schema = self.reader.schema.names, self.reader.schema
        holding = [name for name in names if _holds_images(schema.field(name).type)]
        if wanted != AUTO or len(holding) == 1:
            return holding[0] if wanted == AUTO else wanted
        return pick(AUTO, IMAGE_COLUMNS, holding) or pick(AUTO, IMAGE_COLUMNS, names) or "image"

    def _check_columns(self) -> None:
        for file, known in enumerate(footer["columns"] for footer in self._index):
            self.wanted.check(known, f"{self.name}, file {self.files[file]}" if file else self.name)
        for kind, column in (("image", self.wanted.image), ("caption", self.wanted.caption)):
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

    def hash_with(self, where: Mapping[str, object]) -> str:
        """The hash of those rows that have some values."""
        rows, prints = [f["rows"] for f in self._index], [f["prints"] for f in self._index]
        return self.origin.rows_hash(self.files, prints, rows, sorted(where.items()))

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        if self.wanted.label is None:
            return None
        values = self.reader.column(self.wanted.label)
        return [self._classes.index(values[row]) for row in rows]

    def row_name(self, row: int) -> str:
        return self._name_of(*self.locate(row))

    def _name_of(self, block: int, within: int) -> str:
        file, group = self._groups[block]
        return f"{self.files[file]} row {within} of row group {group}"

    def read_block(self, block: int) -> Sequence[Record]:
        if block in self._resident:
            return self._resident[block]
        wanted = self.wanted
        names = [n for n in (wanted.image, wanted.label, wanted.caption) if n]
        table = self.reader.table(*self._groups[block], names)
        image, path = _encoded(table[wanted.image])
        label = table[wanted.label].to_pylist() if wanted.label else None
        caption = table[wanted.caption].to_pylist() if wanted.caption else None

        def record(at: int) -> Record:
            data = image[at].as_py()
            alone = path[at].as_py() if data is None and path is not None else None
            return Record(
                data,
                None if label is None else self._classes.index(label[at]),
                () if caption is None else caption_texts(caption[at], self.name),
                self._name_of(block, at),
                f"the row holds the path {alone!r} alone: `save_to_disk` of `datasets` stores images" if alone else "",
            )

        rows = LazyRows(int(self.block_sizes[block]), record)
        if self.random_access:
            self._resident[block] = rows
        return rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resident": {}}


def rows_with(source: TableSource, where: Mapping[str, object]) -> Source:
    """The rows of a table with a value in each of some columns.

    Raises:
        UserError: a column is not there, or there is no such row.
    """
    if not where:
        return source
    keep = np.ones(len(source), dtype=bool)
    for column, value in where.items():
        check_column("filter", column, source.columns(), source.name)
        keep &= np.array([v == value for v in source.reader.column(column)], dtype=bool)
    if not keep.any():
        raise UserError(f"no row of {source.name} has {', '.join(f'{k} = {v!r}' for k, v in where.items())}")
    part = SubSource(source, keep, "")
    part.rows_hash = source.hash_with(where)
    return part


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
