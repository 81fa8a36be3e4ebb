"""Where rows come from: a folder of pictures, Parquet files, tar shards; on this disk or on a server.

A source is a fixed list of rows in *blocks*. What is read together is one block; a source with random access reads any
row alone. Nothing is decoded here.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffzoo.errors import UserError, did_you_mean
from diffzoo.images import SUFFIXES
from diffzoo.rng import key

__all__ = ["FolderSource", "LazyRows", "Notes", "Record", "Source", "SubSource", "ids_hash", "rows_hash"]

Indices = np.ndarray[Any, np.dtype[np.int64]]

AUTO = "auto"
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # on the pictures below the folder where one lies


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


def rows_hash(parts: Iterable[object]) -> str:
    """A short hash of what identifies the rows of a source; a run refuses to resume on other rows."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\x1e".encode())
    return digest.hexdigest()[:32]


def ids_hash(ids: Iterable[int]) -> str:
    """SHA-256 of rows in their order, each as eight bytes, little-endian."""
    return hashlib.sha256(np.fromiter(ids, dtype="<i8").tobytes()).hexdigest()


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


class Notes:
    """What is known of single pictures: by metadata files, the folders that they lie in and texts beside them.

    Metadata files are those of Hugging Face's `imagefolder`: each row names a picture by its path from the file's own
    folder, in `file_name`. Where there are any, they say which pictures there are.

    Args:
        pictures: paths of all pictures, below one folder.
        metadata: content of each metadata file, by its path.
        class_of: class of a picture by its path; None: folders are no classes.
        texts: whether there are text files beside pictures.
        name: for messages.
        label, caption: which column; "auto" finds the usual names. Without metadata there are "label", the folder,
            and "txt", the text beside a picture.
        class_names: names of the classes, or of those of the training rows.

    Attributes:
        files: picture of each row.
        class_names: names of the classes; empty without labels.
        labels: class index of each row, or None where a row has none; None without labels.
        captions: texts of each row; None if they are not in metadata.
        beside: whether captions are the texts beside the pictures.

    Raises:
        UserError: a metadata file is damaged or names no picture, a column is missing, a class is unknown.
    """

    def __init__(
        self,
        pictures: Sequence[str],
        metadata: Mapping[str, bytes],
        class_of: Callable[[str], str] | None,
        texts: bool,
        name: str,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        class_names: Sequence[str] | None = None,
    ):
        self.files = list(pictures)
        rows: list[dict[str, Any]] = [{} for _ in self.files]
        if metadata:
            self.files, rows = _read_metadata(metadata, frozenset(pictures), name)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        known = [*columns, *["label"] * (class_of is not None), *["txt"] * texts]
        picked = pick(label, LABEL_COLUMNS, known), pick(caption, CAPTION_COLUMNS, known)
        for kind, column in zip(("label", "caption"), picked, strict=True):
            if column is not None and column not in known:
                raise missing_column(kind, column, known, name)
        self.class_names: list[str] = []
        self.labels: list[int | None] | None = None
        if picked[0] is not None:
            values = [row.get(picked[0]) if picked[0] in columns or class_of is None else class_of(file)
                      for file, row in zip(self.files, rows, strict=True)]  # fmt: skip
            self.class_names, numbers = number_classes(values, class_names, name)
            self.labels = [None if v is None else int(v) if numbers is None else numbers[v] for v in values]
            wrong = [v for v in self.labels if v is not None and not 0 <= v < len(self.class_names)]
            if wrong:
                raise UserError(f"{name} has a label {wrong[0]}, but {len(self.class_names)} classes")
        self.beside = picked[1] == "txt" and "txt" not in columns
        self.captions: list[tuple[str, ...]] | None = None
        if picked[1] is not None and not self.beside:
            self.captions = [_texts(row.get(picked[1])) for row in rows]
        self.has_captions = self.beside or self.captions is not None

    def label_array(self, name: str) -> Indices | None:
        """Class of every row `(rows,)`; None without labels.

        Raises:
            UserError: a row has none.
        """
        if self.labels is None:
            return None
        for file, label in zip(self.files, self.labels, strict=True):
            if label is None:
                raise unlabelled(file, name)
        return np.array(self.labels, dtype=np.int64)


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(str(t) for t in texts if t is not None) or ("",)


def _read_metadata(
    metadata: Mapping[str, bytes], pictures: Collection[str], name: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """(pictures, what is said of them) of all rows, sorted by picture."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for path, content in sorted(metadata.items()):
        try:
            named = [(str(row.pop("file_name")), row) for row in _table(path, content)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} of {name} cannot be read ({type(error).__name__}: {error}): expected rows with a column "
                "file_name, the path of a picture from the folder of this file"
            ) from error
        for file, row in named:
            picture = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
            if picture not in pictures:
                raise UserError(f"{path} of {name} names {file!r}, but there is no such picture")
            rows.append((picture, row))
    rows.sort(key=lambda row: row[0])
    return [picture for picture, _ in rows], [row for _, row in rows]


def _table(path: str, content: bytes) -> list[dict[str, Any]]:
    """Rows of a metadata file. In CSV a column of whole numbers becomes numbers, an empty cell None."""
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        return list(pq.read_table(io.BytesIO(content)).to_pylist())
    text = content.decode("utf-8-sig")
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    lines: list[dict[str, Any]] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    for column in lines[0] if lines else ():
        values = [row[column] or None for row in lines]
        number = column != "file_name" and all(v is None or str(v).removeprefix("-").isdecimal() for v in values)
        for row, value in zip(lines, values, strict=True):
            row[column] = int(value) if number and value is not None else value
    return lines


def _top_folder(file: str) -> str:
    return file.split("/")[0]


class FolderSource(Source):
    """Pictures below a folder; the first level of sub-folders, if any, are the classes.

    A text file of the same name beside a picture (`cat.txt` beside `cat.jpg`) holds its captions, one per line.
    `metadata.jsonl`, `.csv` or `.parquet` says more, as in Hugging Face's `imagefolder`; see `Notes`.

    Args:
        path: the folder.
        classes: True: sub-folders are classes; False: they are not; None: they are if there are any.
        label, caption, class_names: see `Notes`.

    Raises:
        UserError: no such folder, no pictures in it, pictures beside class folders, and as `Notes`.
    """

    random_access = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        classes: bool | None = None,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        class_names: Sequence[str] | None = None,
    ):
        self.root = Path(path)
        self.name = str(path)
        if not self.root.is_dir():
            raise UserError(f"no folder {str(path)!r}: give the folder that holds the pictures")
        files, texts, tables = self._walk()
        if not files:
            raise UserError(f"no pictures below {str(path)!r}: expected files ending in {', '.join(sorted(SUFFIXES))}")
        self._metadata = {table: (self.root / table).read_bytes() for table in sorted(tables)}
        stray = [f for f in files if "/" not in f]
        if classes is None:  # with metadata, folders only are classes if they are asked for
            classes = len(stray) < len(files) and label is not None and (not tables or label == "label")
        if classes and stray:
            raise UserError(
                f"{len(stray)} pictures lie in {str(path)!r} beside its class folders, {stray[0]!r} first: "
                "move them into one, or set classes to false"
            )
        beside = any(posixpath.splitext(f)[0] + ".txt" in texts for f in files)
        class_of = _top_folder if classes else None
        self._notes = Notes(files, self._metadata, class_of, beside, self.name, label, caption, class_names)
        self.files = self._notes.files
        self.class_names, self.has_captions = self._notes.class_names, self._notes.has_captions
        self.block_sizes = np.array([len(self.files)], dtype=np.int64)

    def _walk(self) -> tuple[list[str], set[str], set[str]]:
        """(pictures in order, text files, metadata files), as paths below the folder."""
        pictures, texts, tables = [], set(), set()
        for folder, inner, names in os.walk(self.root, followlinks=True):
            inner[:] = sorted(d for d in inner if not d.startswith("."))
            base = Path(folder).relative_to(self.root)
            for path in ((base / n).as_posix() for n in names if not n.startswith(".")):
                suffix = posixpath.splitext(path)[1]
                if suffix.lower() in SUFFIXES:
                    pictures.append(path)
                elif suffix == ".txt":
                    texts.add(path)
                elif posixpath.basename(path) in METADATA:
                    tables.add(path)
        return sorted(pictures), texts, tables

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        sizes = ((f, (self.root / f).stat().st_size) for f in self.files)
        return rows_hash([*sizes, *self._metadata.items()])

    def read_row(self, row: int) -> Record:
        path = self.root / self.files[row]
        captions: tuple[str, ...] = () if self._notes.captions is None else self._notes.captions[row]
        if self._notes.beside:
            text = path.with_suffix(".txt")
            lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
            captions = tuple(line.strip() for line in lines if line.strip()) or ("",)
        try:
            data = path.read_bytes()
        except OSError:
            data = None
        return Record(data, self._notes.labels[row] if self._notes.labels else None, captions, str(path))

    def read_block(self, block: int) -> Sequence[Record]:
        return LazyRows(len(self), self.read_row)

    def labels(self) -> Indices | None:
        return self._notes.label_array(self.name)


class LazyRows(Sequence[Record]):
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
    def rows_hash(self) -> str:  # type: ignore[override]
        return rows_hash([self.base.rows_hash, self.part, len(self.kept), self.kept.tobytes().hex()])

    def read_block(self, block: int) -> Sequence[Record]:
        records = self.base.read_block(int(self.blocks[block]))
        first = int(self.base.starts[self.blocks[block]])
        rows = self.kept[self.starts[block] : self.starts[block + 1]] - first
        return LazyRows(len(rows), lambda i: records[int(rows[i])])

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


def unlabelled(row: str, source: str) -> UserError:
    """The error for a row without a label in a source that has labels."""
    return UserError(f"{row or 'a row'} of {source} has no label")


def pick(wanted: str | None, usual: Sequence[str], known: Sequence[str]) -> str | None:
    """The column itself, or for "auto" the first usual name that is there."""
    return next((c for c in usual if c in known), None) if wanted == AUTO else wanted


def number_classes(
    values: Iterable[Any], names: Sequence[str] | None, where: str
) -> tuple[list[str], dict[str, int] | None]:
    """Names of the classes, and the number of each label; None where labels are numbers themselves.

    Args:
        values: labels, texts or numbers; None is none.
        names: the classes, if they are known, such as those of the training rows; None: texts in alphabetical order.
        where: the source, for the message.

    Raises:
        UserError: a text is not among the names.
    """
    try:
        present = {v if isinstance(v, str) else int(v) for v in values if v is not None}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} has labels that are neither texts nor whole numbers ({error}): choose another label column, or "
            "none to leave labels out"
        ) from error
    if not any(isinstance(v, str) for v in present):
        return list(names or map(str, range(max(map(int, present), default=-1) + 1))), None
    names = list(names or sorted(map(str, present)))
    unknown = sorted(map(str, present - set(names)))
    if unknown:
        raise UserError(
            f"{where} has a class {unknown[0]!r}, which is not among the {len(names)} classes of the training split or "
            f"of class_names{did_you_mean(unknown[0], names)}"
        )
    return names, {n: i for i, n in enumerate(names)}


def below_common_folder(files: Sequence[str]) -> list[str]:
    """The paths of files below the folder that they share: the same on every machine. URLs stay what they are."""
    if any("://" in f for f in files):
        return list(files)
    base = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])
    return [Path(os.path.relpath(f, base)).as_posix() for f in files]
