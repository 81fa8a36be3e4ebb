"""WebDataset shards as a source: tar files in which the parts of a sample share a name and differ in their suffix."""

import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffzoo.data.remote import file_system, index_folder, retried
from diffzoo.data.sources import SUFFIXES, Indices, Record, Source, fingerprint, missing_column
from diffzoo.errors import UserError
from diffzoo.files import write_text

__all__ = ["TarSource"]

BLOCK_ROWS = 64  # of a remote shard, fetched in one request

Sample = tuple[str, dict[str, tuple[int, int]]]  # name, {suffix: (offset, size)}


class TarSource(Source):
    """Rows of WebDataset shards.

    An index of what lies where is read once; for published files it is kept on disk. Local shards have random access.

    Args:
        files: paths or URLs of uncompressed tar files, in order.
        name: for messages.
        image: suffix of the pictures, such as "jpg"; None: the first that is a picture's.
        label: suffix of a text file with the class index, such as "cls".
        caption: suffix of a text file with captions, one per line, such as "txt".
        class_names: names of the classes; None: their numbers.
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
        revision: str = "",
        licence: str = "",
    ):
        if not files:
            raise UserError(f"{name} has no tar files")
        self.files, self.name, self.revision, self.licence = list(files), name, revision, licence
        self._fs, self.remote = file_system(self.files[0])
        self.random_access = not self.remote
        with ThreadPoolExecutor(4) as pool:
            shards = list(pool.map(self._index, self.files))
        self._samples: list[tuple[int, Sample]] = [(f, s) for f, shard in enumerate(shards) for s in shard]
        if not self._samples:
            raise UserError(f"{name} has no samples in its {len(self.files)} tar files")
        self._suffixes = sorted({suffix for _, (_, parts) in self._samples for suffix in parts})
        self._image = image or next((s for s in self._suffixes if f".{s.lower()}" in SUFFIXES), "jpg")
        self._label, self._caption = label, caption
        for kind, suffix in (("image", self._image), ("label", label), ("caption", caption)):
            if suffix is not None and suffix not in self._suffixes:
                raise missing_column(kind, suffix, self._suffixes, name)
        self._set_blocks()
        self.has_captions = caption is not None
        self.class_names = self._classes(class_names)
        self.fingerprint = fingerprint([revision, *(f"{f} {name} {parts}" for f, (name, parts) in self._samples)])

    def _index(self, file: str) -> list[Sample]:
        stat = retried(file, lambda: self._fs.info(file))
        identity = fingerprint([file, stat["size"], stat.get("mtime", ""), self.revision])
        path = index_folder() / f"{identity}.json"
        if path.is_file():
            return [(name, {s: (o, n) for s, (o, n) in parts.items()}) for name, parts in json.loads(path.read_text())]
        samples = retried(file, lambda: self._scan(file))
        write_text(path, json.dumps(samples))
        return samples

    def _scan(self, file: str) -> list[Sample]:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with self._fs.open(file, "rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                for entry in tar:
                    folder, _, base = entry.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if entry.isfile() and stem and suffix:
                        samples.setdefault(f"{folder}/{stem}", {})[suffix] = (entry.offset_data, entry.size)
        except tarfile.ReadError as error:
            raise UserError(f"{file} is no uncompressed tar file, or it is truncated: {error}") from error
        return list(samples.items())

    def _set_blocks(self) -> None:
        """Runs of at most BLOCK_ROWS samples of one shard."""
        shards = np.array([f for f, _ in self._samples])
        sizes: list[int] = []
        for shard in np.unique(shards):
            rows = int((shards == shard).sum())
            sizes += [min(BLOCK_ROWS, rows - k) for k in range(0, rows, BLOCK_ROWS)]
        self.block_sizes = np.array(sizes, dtype=np.int64)

    def columns(self) -> list[str]:
        return self._suffixes

    def _classes(self, given: Sequence[str] | None) -> list[str]:
        if self._label is None:
            return []
        if given:
            return list(given)
        labels = self.labels()
        assert labels is not None
        return [str(i) for i in range(int(labels.max()) + 1)]

    def labels(self) -> Indices | None:
        if self._label is None:
            return None
        return np.array([self._class_index(row, self._part(row, self._label)) for row in range(len(self))])

    def _class_index(self, row: int, data: bytes | None) -> int:
        try:
            return int((data or b"").decode().strip())
        except ValueError:
            name = self._samples[row][1][0]
            raise UserError(f"{self.name}: {name}.{self._label} is not a class index") from None

    def _part(self, row: int, suffix: str) -> bytes | None:
        file, (_, parts) = self._samples[row]
        if suffix not in parts:
            return None
        offset, size = parts[suffix]
        return self._range(file, offset, offset + size)

    def _range(self, file: int, first: int, last: int) -> bytes:
        path = self.files[file]
        return bytes(retried(path, lambda: self._fs.cat_file(path, start=first, end=last)))

    def read_row(self, row: int) -> Record:
        return self._record(row, lambda suffix: self._part(row, suffix))

    def read_block(self, block: int) -> Sequence[Record]:
        rows = range(int(self.starts[block]), int(self.starts[block + 1]))
        spans = [span for row in rows for span in self._samples[row][1][1].values()]
        file, first = self._samples[rows[0]][0], min(o for o, _ in spans)
        data = self._range(file, first, max(o + n for o, n in spans))

        def part(row: int, suffix: str) -> bytes | None:
            offset, size = self._samples[row][1][1].get(suffix, (0, -1))
            return None if size < 0 else data[offset - first : offset - first + size]

        return [self._record(row, lambda suffix, row=row: part(row, suffix)) for row in rows]

    def _record(self, row: int, part: Any) -> Record:
        file, (name, _) = self._samples[row]
        label = None if self._label is None else self._class_index(row, part(self._label))
        captions: tuple[str, ...] = ()
        if self._caption is not None:
            lines = (part(self._caption) or b"").decode("utf-8", "replace").splitlines()
            captions = tuple(line.strip() for line in lines if line.strip()) or ("",)
        return Record(part(self._image), label, captions, f"{self.files[file]}: {name}")
