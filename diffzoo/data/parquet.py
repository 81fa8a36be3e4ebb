"""Parquet files and Arrow tables: their index and their columns, on this disk or on any file system of fsspec."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict, TypeVar

from diffzoo.data.remote import file_system, index_folder, kept, retried
from diffzoo.data.sources import rows_hash
from diffzoo.errors import UserError
from diffzoo.files import HEAD, kind_of

__all__ = ["ArrowFiles", "ParquetFiles", "class_names"]

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Value = TypeVar("Value")

OPEN_FILES = 8
FOOTER_GUESS = 64 * 2**10  # bytes that hold most footers
LIGHT_READS = 16  # files of which a small column is read at the same time
SPARSE = 2**20  # bytes per row group above which a small column is read piece by piece
INDEX_FORMAT = 4


class Footer(TypedDict):
    """What is known of a file without reading its rows.

    rows:    of each group.
    bytes:   of all of them.
    columns: their names.
    classes: a hash of the class names of each column that has them.
    prints:  changes with the rows.
    """

    rows: list[int]
    bytes: int
    columns: list[str]
    classes: dict[str, str]
    prints: str


class ParquetFiles:
    """Parquet files, read by row group.

    Args:
        files: paths or URLs, in order.
        revision: of the published data set, if it is one; then what was read of remote files is kept on disk.

    Attributes:
        index: what is known of each file.

    Raises:
        UserError: a file is damaged.
    """

    def __init__(self, files: Sequence[str], revision: str = ""):
        self.files, self._revision = list(files), revision
        self._fs, self.remote = file_system(self.files[0])
        # by thread and file: no other thread closes a file in use
        self._open: dict[tuple[int, int], pq.ParquetFile] = {}
        self._owner = os.getpid()
        self.index: list[Footer] = []
        with ThreadPoolExecutor(8) as pool:
            self.index = kept(self._kept_name(), lambda: list(pool.map(self._footer, range(len(self.files)))))

    def _footer(self, file: int) -> Footer:
        metadata, printed = self._metadata(file)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        size = sum(g.total_byte_size for g in groups)
        return _footer([g.num_rows for g in groups], size, metadata.schema.to_arrow_schema(), printed)

    def _metadata(self, file: int) -> "tuple[pq.FileMetaData, str]":
        """See `_read_footer`."""

        def read() -> "tuple[pq.FileMetaData, str]":
            with self._opened(file) as handle:
                return _read_footer(self.files[file], handle)

        return self._reading(file, read)

    def _kept_name(self, *what: str) -> str | None:
        """What something about all files is kept as; None for files that may change."""
        if not (self.remote and self._revision):
            return None
        return rows_hash([INDEX_FORMAT, self._revision, *self.files, *what])

    @cached_property
    def schema(self) -> "pa.Schema":
        """The Arrow schema, which is that of the first file."""
        return self._metadata(0)[0].schema.to_arrow_schema()

    def column(self, name: str) -> list[object]:
        """Every value of a small column, in the order of all rows of all files."""

        def read() -> list[object]:
            with ThreadPoolExecutor(LIGHT_READS if self.remote else 1) as pool:
                parts = list(pool.map(lambda file: self._light_of(file, name), range(len(self.files))))
            return [value for part in parts for value in part]

        return kept(self._kept_name(name), read)

    def _light_of(self, file: int, column: str) -> list[object]:
        import pyarrow.parquet as pq

        sizes = self.index[file]["rows"]
        if not sum(sizes):
            return []
        metadata, _ = self._metadata(file)
        spacing = max(metadata.row_group(g).total_byte_size for g in range(len(sizes)))
        # between the values lie images: what is fetched ahead takes them along, so large ones are jumped over
        settings = {"cache_type": "none"} if self.remote and spacing > SPARSE else {}

        def read() -> list[object]:
            with self._opened(file, **settings) as handle:
                opened = pq.ParquetFile(handle, metadata=metadata, pre_buffer=False)
                return list(opened.read_row_groups(range(len(sizes)), [column], use_threads=False)[column].to_pylist())

        return self._reading(file, read)

    def table(self, file: int, group: int, columns: Sequence[str]) -> "pa.Table":
        """Some columns of a row group."""
        return self._reading(file, lambda: self._parquet(file).read_row_group(group, columns=list(columns)))

    def _reading(self, file: int, action: Callable[[], Value]) -> Value:
        """`action()` on a file, again where that may help, with errors as sentences."""
        name = self.files[file]
        return _explained(name, lambda: retried(name, action, lambda: self._close(file), self.remote))

    def _opened(self, file: int, **settings: str) -> BinaryIO:
        opened: BinaryIO = self._fs.open(str(self._fs._strip_protocol(self.files[file])), "rb", **settings)
        return opened

    def _parquet(self, file: int) -> "pq.ParquetFile":
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
        if self.index and printed != self.index[file]["prints"]:
            raise UserError(
                f"{self.files[file]} has changed since it was indexed, so positions have no meaning in it: "
                f"pin a revision, or delete {index_folder()} to begin anew"
            )

    def _close(self, file: int) -> None:
        opened = self._open.pop((threading.get_ident(), file), None)
        if opened is not None:
            opened.close(force=True)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


class ArrowFiles:
    """Tables as `save_to_disk` of `datasets` writes them, mapped into memory; a group is a batch of records.

    Args:
        files: paths, in order.

    Attributes:
        index: what is known of each file.

    Raises:
        UserError: a file is damaged.
    """

    remote = False

    def __init__(self, files: Sequence[str]):
        self.files = list(files)
        self._tables: list[pa.Table] = []
        self.index = [self._footer(k) for k in range(len(self.files))]

    def _footer(self, file: int) -> Footer:
        rows = [len(batch) for batch in self._batches(file)]
        return _footer(rows, 0, self._tables[file].schema, _file_print(Path(self.files[file])))

    def _batches(self, file: int) -> "list[pa.RecordBatch]":
        import pyarrow as pa

        if not self._tables:
            self._tables = [
                _explained(f, lambda f=f: pa.ipc.open_stream(pa.memory_map(f)).read_all())  # type: ignore[misc]
                for f in self.files
            ]
        batches: list[pa.RecordBatch] = self._tables[file].to_batches()
        return batches

    @property
    def schema(self) -> "pa.Schema":
        """The Arrow schema."""
        self._batches(0)
        return self._tables[0].schema

    def column(self, name: str) -> list[object]:
        """Every value of a small column, in the order of all rows of all files."""
        return [value for k in range(len(self.files)) for b in self._batches(k) for value in b[name].to_pylist()]

    def table(self, file: int, group: int, columns: Sequence[str]) -> "pa.Table":
        """Some columns of a batch of records."""
        import pyarrow as pa

        return pa.Table.from_batches([self._batches(file)[group]]).select(list(columns))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": []}


def _file_print(path: Path) -> str:
    """Size and hash of the ends of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        ends = [file.seek(at) * 0 or file.read(FOOTER_GUESS) for at in (0, max(0, size - FOOTER_GUESS))]
    return f"{size}-{hashlib.sha256(b''.join(map(bytes, ends))).hexdigest()[:32]}"


def class_names(schema: "pa.Schema") -> dict[str, list[str]]:
    """The class names of each `ClassLabel` column, as `datasets` keeps them in the metadata of a schema."""
    kept = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(kept).get("info", {}).get("features", {}) if kept else {}
    return {c: list(f["names"]) for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}


def _footer(rows: list[int], size: int, schema: "pa.Schema", printed: str) -> Footer:
    classes = {column: rows_hash(names) for column, names in class_names(schema).items()}
    return Footer(rows=rows, bytes=size, columns=list(schema.names), classes=classes, prints=printed)


def _read_footer(name: str, handle: BinaryIO) -> "tuple[pq.FileMetaData, str]":
    """(metadata, print) of an open file.

    The print is the size and the hash of the footer, which holds where every column of every row group lies, how
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
        handle.seek(0)
        kind, advice = kind_of(handle.read(HEAD)) if size else ("empty", "")
        what = f"{kind or 'truncated or no Parquet file'} ({size} bytes)"
        raise UserError(f"{name} is {what}: {advice or 'write or fetch it again'}")
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
