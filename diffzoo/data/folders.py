"""Image files as a source: in a folder, a zip file or a repository of the Hub."""

import os
import posixpath
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from diffzoo.data.metadata import (
    METADATA,
    PREFIX,
    USUAL,
    Annotations,
    Columns,
    Row,
    json_fields,
    names_images,
    prefix_of,
    read_metadata,
    text_lines,
)
from diffzoo.data.remote import file_system, retried
from diffzoo.data.sources import UNPUBLISHED, Origin, Record, Source, rows_hash
from diffzoo.errors import UserError
from diffzoo.images import SUFFIXES

__all__ = ["ImageFiles", "Listing", "by_kind", "walk"]


@dataclass(frozen=True)
class Listing:
    """Image files below a root and the files beside them, as paths relative to it.

    root:   folder, URL of a repository, or `zip://::` and a file.
    images: in order.
    texts:  text files of the same name beside images.
    fields: JSON files of the same name beside images.
    tables: metadata files; those above the root begin with "../".
    folder: the name of the root in the place that it is a split of, such as "train"; "" for the whole place.
    below:  the folder in which class folders lie, such as "train/"; "" for the root.
    broken: dangling and circular links.
    unread: all other files.
    """

    root: str
    images: Sequence[str]
    texts: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    tables: Sequence[str] = ()
    folder: str = ""
    below: str = ""
    broken: Sequence[str] = ()
    unread: Sequence[str] = ()

    @classmethod
    def of(cls, root: str, paths: Sequence[str], broken: Sequence[str] = ()) -> "Listing":
        """The listing of all files below a root. Arrays are images where there are no others."""

        def ending(suffixes: Collection[str]) -> list[str]:
            return sorted(path for path in paths if posixpath.splitext(path)[1].lower() in suffixes)

        images = ending(SUFFIXES) or ending([".npy"])
        stems = [posixpath.splitext(image)[0] for image in images]
        texts, fields = (frozenset(paths) & {stem + suffix for stem in stems} for suffix in (".txt", ".json"))
        tables = [path for path in paths if posixpath.basename(path) in METADATA]
        unread = sorted({*paths} - {*images, *texts, *fields, *tables})
        return cls(root, images, texts, fields, sorted(tables), broken=broken, unread=unread)

    def split(self, folder: str) -> "Listing":
        """The listing of one folder in it, with the metadata above."""
        inside, up = folder + "/", "../" * (folder.count("/") + 1)

        def within(paths: Iterable[str]) -> list[str]:
            return [path.removeprefix(inside) for path in paths if path.startswith(inside)]

        above = [up + t for t in self.tables if folder.startswith(posixpath.dirname(t)) and not t.startswith(inside)]
        root = f"zip://{folder}{self.root[6:]}" if self.root.startswith("zip://") else f"{self.root}/{folder}"
        texts, fields = frozenset(within(self.texts)), frozenset(within(self.fields))
        tables, broken = [*above, *within(self.tables)], within(self.broken)
        return Listing(root, within(self.images), texts, fields, tables, folder, broken=broken)

    @property
    def stray(self) -> list[str]:
        """Images that lie beside class folders."""
        return [i for i in self.images if "/" not in i.removeprefix(self.below)]

    def class_folder(self, image: str) -> str:
        """The class folder that an image lies in."""
        return image.removeprefix(self.below).split("/")[0]


def walk(root: Path) -> tuple[list[str], list[str]]:
    """(files, dangling or circular links) below a folder, without hidden ones, as paths relative to it."""
    files: list[str] = []
    broken: list[str] = []
    todo = [("", os.path.realpath(root))]
    while todo:
        below, real = todo.pop()
        for entry in os.scandir(root / below):
            path = below + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not os.path.exists(target) or (real + os.sep).startswith(target + os.sep):
                    broken.append(path)
                elif os.path.isdir(target):
                    todo.append((path + "/", target))
                else:
                    files.append(path)
            elif entry.is_dir():
                todo.append((path + "/", f"{real}/{entry.name}"))
            else:
                files.append(path)
    return sorted(files), sorted(broken)


def by_kind(files: Sequence[str]) -> str:
    """Names of files; of several with one suffix, how many there are: "labels.csv, 12 .json"."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        kinds.setdefault(posixpath.splitext(file)[1] or file, []).append(file)
    return ", ".join(f"{len(found)} {kind}" if len(found) > 1 else found[0] for kind, found in kinds.items())


class Root:
    """The files below a folder, in a zip file, or in a repository of the Hub, by their paths from there.

    Args:
        url: as the root of a `Listing`.
    """

    def __init__(self, url: str):
        self._url = url
        self._inside, _, self._archive = url[6:].partition("::") if url.startswith("zip://") else (url, "", "")
        self._fs, self.remote = file_system(url)
        self._pid = os.getpid()

    def name(self, path: str) -> str:
        """What a file is called in messages."""
        return posixpath.join(self._archive, self._inside, path) if self._archive else f"{self._url}/{path}"

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        if not self._archive and not self.remote:
            return Path(self._url, path).read_bytes()
        if self._archive and self._pid != os.getpid():  # open files do not survive a fork
            self._fs, self._pid = file_system(self._url, fresh=True)[0], os.getpid()
        file = posixpath.join(self._inside, path)
        return retried(file, lambda: bytes(self._fs.cat_file(file)), remote=self.remote)

    def size(self, path: str) -> int:
        """Bytes of a file on this disk."""
        inside = posixpath.join(self._inside, path)
        return int(self._fs.size(inside)) if self._archive else Path(self._url, path).stat().st_size

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": -1}  # a zip file is opened anew


class ImageFiles(Source):
    """Single image files; their folders are their classes, unless metadata files state labels.

    A text file of the same name beside an image (`cat.txt` beside `cat.jpg`) holds its captions, one per line. Labels
    and captions may also be fields of a JSON file beside it (`cat.json`), or come from `metadata.jsonl`, `.csv` or
    `.parquet`, as in Hugging Face's `imagefolder`, or from the `dataset.json` of EDM's tools; see `Annotations`.

    Args:
        listing: the files.
        columns: see `Annotations`; the label "prefix" is the file name without its number.
        name: for messages.
        class_names: see `Annotations`.
        classes: True: sub-folders are classes; False: they are not; None: they are if there are any, and no metadata.
        origin: where the files come from.

    Raises:
        UserError: there are no images, or some lie beside class folders, and as `Annotations`.
    """

    random_access = True

    def __init__(
        self,
        listing: Listing,
        columns: Columns,
        name: str,
        class_names: Sequence[str] | None = None,
        classes: bool | None = None,
        origin: Origin = UNPUBLISHED,
    ):
        if not listing.images:
            there = f", found {by_kind(listing.unread)}" if listing.unread else ""
            raise UserError(
                f"no images below {name!r}: expected files ending in {', '.join(sorted(SUFFIXES))}, .npy{there}"
            )
        self.name, self.revision, self.licence = name, origin.revision, origin.licence
        self._root = Root(listing.root)
        self.remote = self._root.remote
        if listing.broken:
            warnings.warn(
                f"{len(listing.broken)} links below {name} lead nowhere or in a circle, {listing.broken[0]} first: "
                "they are left out"
            )
        tables = {table: self._root.read(table) for table in listing.tables}
        named = {table: names_images(table, data) for table, data in tables.items()}
        self._metadata = {table: data for table, data in tables.items() if named[table] is not None}
        folders, told_by = self._classes_of(listing, columns.label, classes, class_names or ())
        metadata = {table: data for table, data in tables.items() if named[table]}
        if metadata:
            self.files, rows = read_metadata(metadata, frozenset(listing.images), name, listing.folder)
        else:
            self.files, rows = list(listing.images), self._fields(listing, {columns.label, columns.caption})
        self._texts = listing.texts
        notes = Annotations(
            self.files, rows, folders, bool(listing.texts), name, columns, class_names, ", ".join(metadata)
        )
        self._notes, self.class_names, self.has_captions = notes, notes.class_names, bool(notes.captions_from)
        self.block_sizes = np.array([len(self.files)], dtype=np.int64)
        self.captions_from = notes.captions_from
        self.labels_from = "" if notes.labels is None else notes.labels_from or told_by

    def _classes_of(
        self, listing: Listing, label: str | None, classes: bool | None, known: Sequence[str]
    ) -> tuple[dict[str, str] | None, str]:
        """(class of each image by its name or folder, as far as these are classes; how that is told)."""
        if label == PREFIX:
            return {image: prefix_of(image) for image in listing.images}, "the names of the files without their numbers"
        stray = listing.stray
        if classes is None:  # with metadata, folders only are classes if they are asked for, or those of training rows
            inside = len(stray) < len(listing.images)
            asked = label == "label" or (not stray and {*map(listing.class_folder, listing.images)} <= set(known))
            classes = inside and label is not None and (not self._metadata or asked)
        if not classes:
            return None, ""
        if stray:
            raise UserError(
                f"{len(stray)} images lie in {self.name!r} beside its class folders, {stray[0]!r} first: "
                "move them into one, or set classes to false"
            )
        told = "the folders" + (f" in {listing.below}" if listing.below else "")
        return {image: listing.class_folder(image) for image in listing.images}, told

    def _fields(self, listing: Listing, asked: set[str | None]) -> list[Row]:
        """What the JSON file beside each image says in the usual and the asked fields."""
        known, found = {*USUAL, *asked}, []
        for image in listing.images:
            path = posixpath.splitext(image)[0] + ".json"
            try:
                fields = json_fields(self._root.read(path)) if path in listing.fields else {}
            except ValueError as error:
                raise UserError(f"{path} of {self.name} is no JSON ({error}): repair it, or take it away") from error
            found.append({k: v for k, v in fields.items() if k in known})
        return found

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        if self.revision:  # then names say it all; other files may change under their names
            return rows_hash([self.revision, *self.files, *self._metadata.items()])
        return rows_hash([*((f, self._root.size(f)) for f in self.files), *self._metadata.items()])

    def row_names(self) -> Sequence[str]:
        return self.files

    def read_row(self, row: int) -> Record:
        file, notes, name = self.files[row], self._notes, self._root.name(self.files[row])
        label = notes.labels[row] if notes.labels else None
        captions: tuple[str, ...] = () if notes.captions is None else notes.captions[row]
        try:
            if notes.beside:
                text = posixpath.splitext(file)[0] + ".txt"
                captions = text_lines(self._root.read(text), text) if text in self._texts else ("",)
            return Record(self._root.read(file), label, captions, name)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, UserError) or (self.remote and not isinstance(error, ValueError)):
                raise
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return Record(None, label, captions, name, why)

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        labels = self._notes.labels
        return None if labels is None else [labels[row] for row in rows]

    def row_name(self, row: int) -> str:
        return self.files[row]
