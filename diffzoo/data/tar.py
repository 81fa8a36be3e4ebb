"""WebDataset shards as a source: tar files in which the parts of a sample share a name and differ in their suffix.

The parts of a sample are its columns, and so are the fields of its `.json` part.
"""

import contextlib
import json
import posixpath
import re
import tarfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from diffzoo.data.metadata import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    PREFIX,
    Classes,
    caption_texts,
    json_fields,
    label_of,
    missing_column,
    pick,
    prefix_of,
    text_lines,
)
from diffzoo.data.remote import file_system, kept, retried
from diffzoo.data.sources import (
    Indices,
    Record,
    Source,
    below_common_folder,
    label_array,
    rows_hash,
)
from diffzoo.errors import UserError
from diffzoo.files import HEAD, kind_of
from diffzoo.images import SUFFIXES

__all__ = ["TarSource"]

Value = TypeVar("Value")

FOLDER = "folder"  # as the label
BLOCK_ROWS = 64  # of a remote shard, fetched in one request

SHORT = 32  # bytes; parts up to this size, such as class indices, are kept in the index
INDEX_FORMAT = 4
JSON = "json"
Sample = tuple[str, dict[str, tuple[int, int]], dict[str, str]]  # name, {suffix: (offset, size)}, {suffix: short text}


def _shows(suffix: str) -> bool:
    return f".{suffix.lower()}" in SUFFIXES


def _folder_of(sample: Sample) -> str:
    return posixpath.dirname(sample[0]).strip("/")


def _whole_suffixes(samples: Sequence[tuple[int, Sample]]) -> bool:
    """Whether `image.png` and `mask.png` are parts of a sample, as every sample has them, and no names with dots."""
    images = {frozenset(s for s in parts if _shows(s.rpartition(".")[2])) for _, (_, parts, _) in samples}
    return len(samples) > 1 and len(images) == 1 and not re.search(r"\d", "".join(next(iter(images))))


def _by_last_suffix(sample: Sample) -> Sample:
    """A sample with its parts `image.png`, `label.cls` and `caption.txt` under `png`, `cls` and `txt`."""
    name, parts, short = sample
    usual = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *CAPTION_COLUMNS}
    new = {s: s.rpartition(".")[2] if s.rpartition(".")[0] in usual else s for s in parts}
    return name, {new[s]: place for s, place in parts.items()}, {new[s]: text for s, text in short.items()}


def _at_the_last_dot(sample: Sample) -> list[Sample]:
    """A sample split at the last dot, for names that hold dots themselves, such as `v1.0.png`, `v1.1.png`."""
    found: dict[str, Sample] = {}
    name, parts, short = sample
    for suffix, place in parts.items():
        more, _, last = suffix.rpartition(".")
        whole = f"{name}.{more}" if more else name
        _, its_parts, its_short = found.setdefault(whole, (whole, {}, {}))
        its_parts[last] = place
        its_short |= {last: short[suffix]} if suffix in short else {}
    return list(found.values())


class TarFiles:
    """The index of tar files: where the parts of each sample lie. For published files it is kept on disk.

    Args:
        files: paths or URLs of uncompressed tar files, in order.
        revision: of the published data set, if it is one.
        label: a field of JSON parts to index besides the usual label fields; None: no other.

    Attributes:
        samples: (number of the file, sample) of each row.
        fields: of the JSON parts.
        prints: of each file: changes with its parts.
    """

    def __init__(self, files: Sequence[str], revision: str, label: str | None):
        self.files, self._revision = list(files), revision
        self._unusual = [label] if label and label not in (*LABEL_COLUMNS, FOLDER, PREFIX) else []
        self._fs, self.remote = file_system(self.files[0])
        with ThreadPoolExecutor(4) as pool:
            shards = list(pool.map(self._index, self.files))
        self.samples: list[tuple[int, Sample]] = [(f, s) for f, shard in enumerate(shards) for s in shard[1]]
        self.fields = list(dict.fromkeys(field for _, _, found in shards for field in found))
        self.prints = [printed for printed, _, _ in shards]

    def read(self, file: int, first: int, last: int) -> bytes:
        """The bytes of a file from `first` up to `last`."""
        path = self.files[file]
        return bytes(self._retried(path, lambda: self._fs.cat_file(path, start=first, end=last)))

    def _retried(self, file: str, action: Callable[[], Value]) -> Value:
        return retried(file, action, remote=self.remote)

    def _index(self, file: str) -> tuple[str, list[Sample], list[str]]:
        """(fingerprint, samples, fields of the JSON parts) of a file; kept on disk."""
        stat = self._retried(file, lambda: self._fs.info(file))
        identity = rows_hash([INDEX_FORMAT, file, stat["size"], stat.get("mtime", ""), self._revision, *self._unusual])

        def make() -> tuple[str, list[Sample], list[str]]:
            parts, samples, fields = self._retried(file, lambda: self._scan(file))
            return rows_hash([stat["size"], *parts]), samples, fields

        printed, samples, fields = kept(identity, make)
        known = [(name, {s: (o, n) for s, (o, n) in parts.items()}, short) for name, parts, short in samples]
        return printed, known, fields

    def _scan(self, file: str) -> tuple[list[str], list[Sample], list[str]]:
        """(what identifies each part, samples, fields of the JSON parts).

        Short parts and the labels in JSON are read on the way.
        """
        samples: dict[str, Sample] = {}
        prints: list[str] = []
        fields: dict[str, None] = {}
        try:
            with self._fs.open(file, "rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
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
                            labels = {f: found[f] for f in (*LABEL_COLUMNS, *self._unusual) if f in found}
                            short[suffix] = json.dumps(labels)
                    elif entry.size <= SHORT:
                        short[suffix] = end.decode("utf-8", "replace")
                    # two images of one size differ in their last bytes
                    prints.append(f"{entry.name} {entry.offset_data} {entry.size} {end[-SHORT:].hex()}")
        except tarfile.ReadError as error:
            kind, advice = kind_of(bytes(self._fs.cat_file(file, start=0, end=HEAD)))
            what = f"{kind}: {advice}" if kind else f"no tar file, or truncated: {error}"
            raise UserError(f"{file} is {what}") from error
        return prints, list(samples.values()), list(fields)


class TarSource(Source):
    """Rows of WebDataset shards.

    Local shards have random access.

    Args:
        files: paths or URLs of uncompressed tar files, in order.
        name: for messages.
        image: suffix of the images, such as "jpg"; None: whichever of the usual ones a sample has.
        label: suffix of a text file with the class or its index, such as "cls", or a field of the JSON files; "folder":
            the folder inside the file; "prefix": the name of the sample without its number.
        caption: suffix of a text file with captions, one per line, such as "txt", or a field of the JSON files.
        class_names: names of the classes; None: their numbers.
        paths: what the files are called where they are published, so that a copy counts as the same; None: their
            paths below their common folder.
        revision: of the published data set, if it is one.
        licence: as the source states it.
    """

    def __init__(
        self,
        files: Sequence[str],
        name: str,
        image: str | None = None,
        label: str | None = None,
        caption: str | None = None,
        class_names: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        revision: str = "",
        licence: str = "",
    ):
        if not files:
            raise UserError(f"{name} has no tar files")
        self.name, self.revision, self.licence = name, revision, licence
        self._label, self._caption = label, caption
        self.reader = TarFiles(files, revision, label)
        self.files, self.remote, self._samples = self.reader.files, self.reader.remote, self.reader.samples
        self.random_access = not self.remote
        if image is None and not any(_shows(s) for _, (_, parts, _) in self._samples for s in parts):
            whole = _whole_suffixes(self._samples)
            anew = (lambda s: [_by_last_suffix(s)]) if whole else _at_the_last_dot
            self._samples = [(f, again) for f, sample in self._samples for again in anew(sample)]
        if label == FOLDER:  # what lies beside class folders, such as a README, is no row
            self._samples = [sample for sample in self._samples if any(map(_shows, sample[1][1]))]
        if not self._samples:
            raise UserError(f"{name} has no samples in its {len(self.files)} tar files")
        self._suffixes = sorted({suffix for _, (_, parts, _) in self._samples for suffix in parts})
        usual = [s for s in self._suffixes if _shows(s)] or ["npy" if "npy" in self._suffixes else "jpg"]
        self._images = [image] if image else usual  # a sample's image is the first of these that it has
        several = next((p for _, (_, p, _) in self._samples if len(p.keys() & {*self._images}) > 1), None)
        if several is not None:
            found = [s for s in self._images if s in several]
            warnings.warn(
                f"a sample of {name} has the images {', '.join(found)}: {found[0]} is used, set image to choose"
            )
        self._columns = list(dict.fromkeys([*self._suffixes, *self.reader.fields]))
        for kind, suffix in (("image", self._images[0]), ("label", label), ("caption", caption)):
            if suffix is not None and suffix not in (FOLDER, PREFIX, *self._columns):
                raise missing_column(kind, suffix, self._columns, name)
        self._set_blocks()
        self.has_captions = caption is not None
        from_name = {FOLDER: "the folders", PREFIX: "the names of the files without their numbers", None: ""}
        from_name |= {s: f"the files .{s}" for s in self._suffixes}
        self.labels_from, self.captions_from = (
            from_name.get(column, f"the field {column} of the files .json") for column in (label, caption)
        )
        if label is not None:
            self._classes = Classes.of(map(self._value, range(len(self))), class_names, name)
            self.class_names = self._classes.names
        known = zip(paths or below_common_folder(self.files), self.reader.prints, strict=True)
        self.rows_hash = rows_hash([revision, *known])

    def _set_blocks(self) -> None:
        """Runs of at most BLOCK_ROWS samples of one shard."""
        shards = np.array([f for f, _ in self._samples])
        sizes: list[int] = []
        for shard in np.unique(shards):
            rows = int((shards == shard).sum())
            sizes += [min(BLOCK_ROWS, rows - k) for k in range(0, rows, BLOCK_ROWS)]
        self.block_sizes = np.array(sizes, dtype=np.int64)

    def columns(self) -> list[str]:
        return self._columns

    def pick(self, wanted: str | None, usual: Sequence[str]) -> str | None:
        """The column itself, or for "auto" the first usual name among the files, else among the fields of JSON."""
        return pick(wanted, usual, self._suffixes) or pick(wanted, usual, self._columns)

    def folders(self) -> list[str]:
        """The folders inside, if they are classes: in archives of images, perhaps with captions, in several folders."""
        images = [sample for _, sample in self._samples if any(map(_shows, sample[1]))]
        others = [s for _, parts, _ in images for s in parts if not _shows(s) and s.lower() != "txt"]
        found = sorted({self._folder(sample) for sample in images})
        return found if len(found) > 1 and not others else []

    @cached_property
    def _below(self) -> str:
        """The folder in which class folders lie."""
        return posixpath.commonpath([_folder_of(s) for _, s in self._samples if any(map(_shows, s[1]))])

    def _folder(self, sample: Sample) -> str:
        return _folder_of(sample).removeprefix(self._below).lstrip("/").split("/")[0]

    def labels(self) -> Indices | None:
        if self._label is None:
            return None
        return label_array([self._class_index(row) for row in range(len(self))], self._row_name, self.name)

    def _value(self, row: int) -> str | int | None:
        """The label of a row as it is stated, from the index: a class index is short."""
        name, parts, short = self._samples[row][1]
        if self._label == FOLDER:
            return self._folder(self._samples[row][1])
        if self._label == PREFIX:
            return prefix_of(name)
        if self._label not in self._suffixes:
            return label_of(json.loads(short.get(JSON, "{}")).get(self._label), self.name)
        if self._label not in parts:
            return None
        text = short.get(self._label, "").strip()
        if not text:
            raise UserError(f"{self.name}: {name}.{self._label} is no class")
        return int(text) if text.removeprefix("-").isdecimal() else text

    def _class_index(self, row: int) -> int | None:
        return self._classes.index(self._value(row))

    def _row_name(self, row: int) -> str:
        file, (name, _, _) = self._samples[row]
        return f"{self.files[file]}: {name}"

    def _part(self, row: int, suffix: str) -> bytes | None:
        file, (_, parts, _) = self._samples[row]
        if suffix not in parts:
            return None
        offset, size = parts[suffix]
        return self.reader.read(file, offset, offset + size)

    def read_row(self, row: int) -> Record:
        return self._record(row, partial(self._part, row))

    def read_block(self, block: int) -> Sequence[Record]:
        rows = range(int(self.starts[block]), int(self.starts[block + 1]))
        spans = [span for row in rows for span in self._samples[row][1][1].values()]
        file, first = self._samples[rows[0]][0], min(o for o, _ in spans)
        data = self.reader.read(file, first, max(o + n for o, n in spans))

        def part(row: int, suffix: str) -> bytes | None:
            offset, size = self._samples[row][1][1].get(suffix, (0, -1))
            return None if size < 0 else data[offset - first : offset - first + size]

        return [self._record(row, partial(part, row)) for row in rows]

    def _record(self, row: int, part: Callable[[str], bytes | None]) -> Record:
        label = None if self._label is None else self._class_index(row)
        name, parts, _ = self._samples[row][1]
        image = next((part(suffix) for suffix in self._images if suffix in parts), None)
        try:
            captions = self._captions(name, part)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            return Record(None, label, (), self._row_name(row), str(error))
        return Record(image, label, captions, self._row_name(row))

    def _captions(self, name: str, part: Callable[[str], bytes | None]) -> tuple[str, ...]:
        if self._caption is None:
            return ()
        if self._caption in self._suffixes and self._caption != JSON:
            return text_lines(part(self._caption) or b"", f"{name}.{self._caption}")
        fields = json_fields(part(JSON) or b"{}")
        return caption_texts(fields if self._caption == JSON else fields.get(self._caption), self.name)
