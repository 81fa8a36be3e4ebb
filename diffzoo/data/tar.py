"""WebDataset shards as a source: tar files in which the parts of a sample share a name and differ in their suffix.

The parts of a sample are its columns, and so are the fields of its `.json` part.
"""

import contextlib
import json
import posixpath
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffzoo.data.metadata import (
    AUTO,
    LABEL_COLUMNS,
    PREFIX,
    USUAL,
    Classes,
    Columns,
    caption_texts,
    json_fields,
    label_of,
    prefix_of,
    text_lines,
)
from diffzoo.data.remote import file_system, kept, retried
from diffzoo.data.sources import UNPUBLISHED, Origin, Record, Source, rows_hash
from diffzoo.errors import UserError
from diffzoo.files import HEAD, what_is
from diffzoo.images import SUFFIXES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["TarSource"]

FOLDER = "folder"  # as the label
BLOCK_ROWS = 64  # of a remote shard, fetched in one request

SHORT = 32  # bytes; parts up to this size, such as class indices, are kept in the index
INDEX_FORMAT = 4
JSON = "json"
FROM_NAME = {FOLDER: "the folders", PREFIX: "the names of the files without their numbers"}


class Sample(NamedTuple):
    """A sample in a tar file.

    file:  number of the file.
    name:  with its folder, without suffixes.
    parts: offset and size of each, by suffix.
    short: the text of short parts.
    """

    file: int
    name: str
    parts: dict[str, tuple[int, int]]
    short: dict[str, str]

    @property
    def has_image(self) -> bool:
        """Whether a part is an image by its suffix."""
        return any(map(_shows, self.parts))

    @property
    def folder(self) -> str:
        """The folder in which it lies."""
        return posixpath.dirname(self.name).strip("/")


def _shows(suffix: str) -> bool:
    return f".{suffix.lower()}" in SUFFIXES


def _with_plain_suffixes(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose images have no plain suffixes, with plain ones.

    Where every sample has the same ones, such as `image.png` and `mask.png`, they are its parts, and those of usual
    names become `png`, `cls` or `txt`. Otherwise names hold dots themselves, such as `v1.0.png` and `v1.1.png`.
    """
    images = {frozenset(s for s in sample.parts if _shows(s.rpartition(".")[2])) for sample in samples}
    if len(samples) > 1 and len(images) == 1 and not re.search(r"\d", "".join(next(iter(images)))):
        ends = {s: s.rpartition(".") for sample in samples for s in sample.parts}
        new = {s: last if first in USUAL else s for s, (first, _, last) in ends.items()}
        return [
            sample._replace(
                parts={new[s]: place for s, place in sample.parts.items()},
                short={new[s]: text for s, text in sample.short.items()},
            )
            for sample in samples
        ]
    found: dict[tuple[int, str], Sample] = {}
    for file, name, parts, short in samples:
        for suffix, place in parts.items():
            more, _, last = suffix.rpartition(".")
            whole = f"{name}.{more}" if more else name
            sample = found.setdefault((file, whole), Sample(file, whole, {}, {}))
            sample.parts[last] = place
            sample.short.update({last: short[suffix]} if suffix in short else {})
    return list(found.values())


Indexed = tuple[str, dict[str, tuple[int, int]], dict[str, str]]  # a sample without the number of its file
Index = tuple[str, list[Indexed], list[str]]  # fingerprint, samples, fields of the JSON parts


def _scan(
    fs: "AbstractFileSystem", file: str, label_fields: Sequence[str]
) -> tuple[list[str], list[Indexed], list[str]]:
    """(what identifies each part, samples, fields of the JSON parts).

    Short parts and the labels in JSON are read on the way.
    """
    samples: dict[str, Indexed] = {}
    prints: list[str] = []
    fields: dict[str, None] = {}
    try:
        with fs.open(file, "rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for entry in tar:
                folder, _, base = posixpath.normpath(entry.name).rpartition("/")
                stem, _, suffix = base.partition(".")
                if not (entry.isfile() and stem and suffix):
                    continue
                name = f"{folder}/{stem}"
                _, parts, short = samples.setdefault(name, (name, {}, {}))
                parts[suffix] = (entry.offset_data, entry.size)
                is_json = suffix.rpartition(".")[2] == JSON
                count = entry.size if is_json else min(entry.size, SHORT)
                handle.seek(entry.offset_data + entry.size - count)
                end = handle.read(count)
                if is_json:
                    with contextlib.suppress(ValueError):  # a broken one is reported when its row is read
                        found = json_fields(end)
                        fields |= dict.fromkeys(found)
                        labels = {f: found[f] for f in label_fields if f in found}
                        short[suffix] = json.dumps(labels)
                elif entry.size <= SHORT:
                    short[suffix] = end.decode("utf-8", "replace")
                # two images of one size differ in their last bytes
                prints.append(f"{entry.name} {entry.offset_data} {entry.size} {end[-SHORT:].hex()}")
    except tarfile.ReadError as error:
        head = bytes(fs.cat_file(file, start=0, end=HEAD))
        raise UserError(f"{file} is {what_is(head, f'no tar file, or truncated: {error}')}") from error
    return prints, list(samples.values()), list(fields)


class TarFiles:
    """The index of tar files: where the parts of each sample lie. For published files it is kept on disk.

    Args:
        files: paths or URLs of uncompressed tar files, in order.
        revision: of the published data set, if it is one.
        label: a field of JSON parts to index besides the usual label fields; None: no other.

    Attributes:
        samples: of all files, in order.
        fields: of the JSON parts.
        prints: of each file: changes with its parts.
    """

    def __init__(self, files: Sequence[str], revision: str, label: str | None):
        self.files, self._revision = list(files), revision
        self._unusual = [label] if label and label not in (*LABEL_COLUMNS, FOLDER, PREFIX, AUTO) else []
        self._fs, self.remote = file_system(self.files[0])
        with ThreadPoolExecutor(4) as pool:
            shards = list(pool.map(self._index, self.files))
        self.samples = [
            Sample(file, name, {s: (o, n) for s, (o, n) in parts.items()}, short)
            for file, (_, samples, _) in enumerate(shards)
            for name, parts, short in samples
        ]
        self.fields = list(dict.fromkeys(field for _, _, found in shards for field in found))
        self.prints = [printed for printed, _, _ in shards]

    def read(self, file: int, first: int, last: int) -> bytes:
        """The bytes of a file from `first` up to `last`."""
        path = self.files[file]
        return bytes(retried(path, lambda: self._fs.cat_file(path, start=first, end=last), remote=self.remote))

    def _index(self, file: str) -> Index:
        """The index of a file; kept on disk."""
        stat = retried(file, lambda: self._fs.info(file), remote=self.remote)
        identity = rows_hash([INDEX_FORMAT, file, stat["size"], stat.get("mtime", ""), self._revision, *self._unusual])

        def make() -> Index:
            label_fields = [*LABEL_COLUMNS, *self._unusual]
            parts, samples, fields = retried(file, lambda: _scan(self._fs, file, label_fields), remote=self.remote)
            return rows_hash([stat["size"], *parts]), samples, fields

        return kept(identity, make)


class TarSource(Source):
    """Rows of WebDataset shards. Local shards have random access.

    Args:
        files: paths or URLs of uncompressed tar files, in order.
        columns: suffixes of the parts, such as "jpg", "cls" and "txt", or fields of the JSON files. The label "folder"
            is the folder inside the file, "prefix" the name of the sample without its number. "auto" is whichever image
            a sample has, and the usual names for labels and captions, then folders of images for labels.
        name: for messages.
        class_names: names of the classes; None: their numbers.
        origin: where the files come from.

    Raises:
        UserError: a file is damaged, there are no samples, or a column is missing.
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Columns,
        name: str,
        class_names: Sequence[str] | None = None,
        origin: Origin = UNPUBLISHED,
    ):
        self.name, self.revision, self.licence = name, origin.revision, origin.licence
        self.reader = TarFiles(files, origin.revision, columns.label)
        self.files, self.remote = self.reader.files, self.reader.remote
        self.random_access = not self.remote
        self._samples = self._rows(columns)
        self._suffixes = sorted({suffix for sample in self._samples for suffix in sample.parts})
        self._columns = list(dict.fromkeys([*self._suffixes, *self.reader.fields]))
        self._images = [columns.image]
        if columns.image == AUTO:  # a sample's image is the first of these that it has
            self._images = [s for s in self._suffixes if _shows(s)] or ["npy" if "npy" in self._suffixes else "jpg"]
        chosen = replace(columns.among(self._suffixes, self._columns), image=self._images[0])
        if chosen.label is None and columns.label == AUTO and self.folders:
            chosen = replace(chosen, label=FOLDER)
            self._samples = [sample for sample in self._samples if sample.has_image]  # a README is no row
        chosen.check(self._columns, name, (FOLDER, PREFIX))
        self._label, self._caption = chosen.label, chosen.caption
        self._warn_of_several_images()
        of_file = np.bincount([sample.file for sample in self._samples])
        blocks = [min(BLOCK_ROWS, rows - k) for rows in of_file for k in range(0, rows, BLOCK_ROWS)]
        self.block_sizes = np.array(blocks, dtype=np.int64)
        self.labels_from, self.captions_from = self._told(self._label), self._told(self._caption)
        self.has_captions = self._caption is not None
        if self._label is not None:
            self._classes = Classes.of(map(self._value, range(len(self))), class_names, name)
            self.class_names = self._classes.names
        self.rows_hash = origin.rows_hash(self.files, self.reader.prints)

    def _rows(self, columns: Columns) -> list[Sample]:
        samples = self.reader.samples
        if columns.image == AUTO and not any(sample.has_image for sample in samples):
            samples = _with_plain_suffixes(samples)
        if columns.label == FOLDER:
            samples = [sample for sample in samples if sample.has_image]
        if not samples:
            raise UserError(f"{self.name} has no samples in its {len(self.files)} tar files")
        return samples

    def _told(self, column: str | None) -> str:
        """Where labels or captions come from, for reports."""
        told = f"the files .{column}" if column in self._suffixes else f"the field {column} of the files .json"
        return FROM_NAME.get(column, told) if column else ""

    def _warn_of_several_images(self) -> None:
        found = ([s for s in self._images if s in sample.parts] for sample in self._samples)
        if several := next((images for images in found if len(images) > 1), None):
            said = f"the images {', '.join(several)}: {several[0]} is used, set image to choose"
            warnings.warn(f"a sample of {self.name} has {said}")

    def columns(self) -> list[str]:
        return self._columns

    @cached_property
    def folders(self) -> list[str]:
        """The folders inside, if they are classes: in archives of images, perhaps with captions, in several folders."""
        images = [sample for sample in self._samples if sample.has_image]
        others = [s for sample in images for s in sample.parts if not _shows(s) and s.lower() != "txt"]
        found = sorted(set(map(self._folder, images)))
        return found if len(found) > 1 and not others else []

    @cached_property
    def _below(self) -> str:
        """The folder in which class folders lie."""
        return posixpath.commonpath([sample.folder for sample in self._samples if sample.has_image])

    def _folder(self, sample: Sample) -> str:
        return sample.folder.removeprefix(self._below).lstrip("/").split("/")[0]

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        return None if self._label is None else list(map(self._class_index, rows))

    def _value(self, row: int) -> str | int | None:
        """The label of a row as it is stated, from the index: a class index is short."""
        sample, label = self._samples[row], self._label
        if label == FOLDER:
            return self._folder(sample)
        if label == PREFIX:
            return prefix_of(sample.name)
        if label not in self._suffixes:
            return label_of(json.loads(sample.short.get(JSON, "{}")).get(label), self.name)
        if label not in sample.parts:
            return None
        text = sample.short.get(label, "").strip()
        if not text:
            raise UserError(f"{self.name}: {sample.name}.{label} is no class")
        return int(text) if text.removeprefix("-").isdecimal() else text

    def _class_index(self, row: int) -> int | None:
        return self._classes.index(self._value(row))

    def row_name(self, row: int) -> str:
        return f"{self.files[self._samples[row].file]}: {self._samples[row].name}"

    def read_row(self, row: int) -> Record:
        def part(row: int, suffix: str) -> bytes | None:
            if suffix not in self._samples[row].parts:
                return None
            offset, size = self._samples[row].parts[suffix]
            return self.reader.read(self._samples[row].file, offset, offset + size)

        return self._record(row, partial(part, row))

    def read_block(self, block: int) -> Sequence[Record]:
        rows = range(int(self.starts[block]), int(self.starts[block + 1]))
        spans = [span for row in rows for span in self._samples[row].parts.values()]
        first = min(o for o, _ in spans)
        data = self.reader.read(self._samples[rows[0]].file, first, max(o + n for o, n in spans))

        def part(row: int, suffix: str) -> bytes | None:
            offset, size = self._samples[row].parts.get(suffix, (0, -1))
            return None if size < 0 else data[offset - first : offset - first + size]

        return [self._record(row, partial(part, row)) for row in rows]

    def _record(self, row: int, part: Callable[[str], bytes | None]) -> Record:
        label = None if self._label is None else self._class_index(row)
        image = next((part(suffix) for suffix in self._images if suffix in self._samples[row].parts), None)
        try:
            return Record(image, label, self._captions(self._samples[row].name, part), self.row_name(row))
        except UserError:
            raise
        except ValueError as error:
            return Record(None, label, (), self.row_name(row), str(error))

    def _captions(self, name: str, part: Callable[[str], bytes | None]) -> tuple[str, ...]:
        if self._caption is None:
            return ()
        if self._caption in self._suffixes and self._caption != JSON:
            return text_lines(part(self._caption) or b"", f"{name}.{self._caption}")
        fields = json_fields(part(JSON) or b"{}")
        return caption_texts(fields if self._caption == JSON else fields.get(self._caption), self.name)
