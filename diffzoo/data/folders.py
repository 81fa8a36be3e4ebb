"""Image files as a source: in a folder, a zip file or a repository of the Hub."""

import os
import posixpath
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from diffzoo.data.metadata import (
    AUTO,
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    METADATA,
    PREFIX,
    Annotations,
    is_metadata,
    json_fields,
    names_images,
    prefix_of,
    text_lines,
)
from diffzoo.data.remote import file_system, retried
from diffzoo.data.sources import Indices, LazyRows, Record, Source, label_array, rows_hash
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
        by_suffix: dict[str, list[str]] = {}
        for path in paths:
            by_suffix.setdefault(posixpath.splitext(path)[1].lower(), []).append(path)
        images = sorted(p for s, found in by_suffix.items() if s in SUFFIXES for p in found)
        tables = [path for path in paths if posixpath.basename(path) in METADATA]
        images = images or sorted(by_suffix.get(".npy", []))
        texts, fields = (
            frozenset(by_suffix.get(suffix, [])) & {posixpath.splitext(image)[0] + suffix for image in images}
            for suffix in (".txt", ".json")
        )
        unread = sorted({*paths} - {*images, *texts, *fields, *tables})
        return cls(root, images, texts, fields, sorted(tables), broken=broken, unread=unread)

    def split(self, folder: str) -> "Listing":
        """The listing of one folder in it, with the metadata above."""
        inside, up = folder + "/", "../" * (folder.count("/") + 1)
        above = [up + t for t in self.tables if folder.startswith(posixpath.dirname(t)) and not t.startswith(inside)]
        root = f"zip://{folder}{self.root[6:]}" if self.root.startswith("zip://") else f"{self.root}/{folder}"
        return Listing(
            root,
            [i.removeprefix(inside) for i in self.images if i.startswith(inside)],
            frozenset(t.removeprefix(inside) for t in self.texts if t.startswith(inside)),
            frozenset(f.removeprefix(inside) for f in self.fields if f.startswith(inside)),
            [*above, *(t.removeprefix(inside) for t in self.tables if t.startswith(inside))],
            folder,
            broken=[b.removeprefix(inside) for b in self.broken if b.startswith(inside)],
        )

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


class ImageFiles(Source):
    """Single image files; their folders are their classes, unless metadata files state labels.

    A text file of the same name beside an image (`cat.txt` beside `cat.jpg`) holds its captions, one per line. Labels
    and captions may also be fields of a JSON file beside it (`cat.json`), or come from `metadata.jsonl`, `.csv` or
    `.parquet`, as in Hugging Face's `imagefolder`, or from the `dataset.json` of EDM's tools; see `Annotations`.

    Args:
        listing: the files.
        name: for messages.
        label, caption, class_names: see `Annotations`; the label "prefix" is the file name without its number.
        classes: True: sub-folders are classes; False: they are not; None: they are if there are any, and no metadata.
        revision, licence: as published.

    Raises:
        UserError: there are no images, or some lie beside class folders, and as `Annotations`.
    """

    random_access = True

    def __init__(
        self,
        listing: Listing,
        name: str,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        class_names: Sequence[str] | None = None,
        classes: bool | None = None,
        revision: str = "",
        licence: str = "",
    ):
        if not listing.images:
            there = f", found {by_kind(listing.unread)}" if listing.unread else ""
            raise UserError(
                f"no images below {name!r}: expected files ending in {', '.join(sorted(SUFFIXES))}, .npy{there}"
            )
        self.name, self.revision, self.licence = name, revision, licence
        self._root, self._zip, self._labels_from = listing.root, listing.root.startswith("zip://"), ""
        self._fs, self.remote = file_system(listing.root)
        self._pid = os.getpid()
        if listing.broken:
            warnings.warn(
                f"{len(listing.broken)} links below {name} lead nowhere or in a circle, {listing.broken[0]} first: "
                "they are left out"
            )
        found = {table: self._read(table) for table in listing.tables}
        self._metadata = {table: data for table, data in found.items() if is_metadata(table, data)}
        folders = self._classes_of(listing, label, classes, class_names or ())
        metadata = {t: data for t, data in self._metadata.items() if names_images(t, data)}
        beside = any(posixpath.splitext(i)[0] + ".txt" in listing.texts for i in listing.images)
        if label == PREFIX:
            label = "label"
        fields = {} if metadata else self._fields(listing, {label, caption})
        self._notes = notes = Annotations(
            listing.images, metadata, folders, beside, fields, name, label, caption, class_names, listing.folder
        )
        self.files, self._texts = notes.files, listing.texts
        self.class_names, self.has_captions = notes.class_names, notes.has_captions
        self.block_sizes = np.array([len(self.files)], dtype=np.int64)
        told = f"the column {{}} of {', '.join(metadata)}" if metadata else "the field {} of the files .json"
        if notes.labels is not None:
            self.labels_from = self._labels_from if notes.by_folder else told.format(notes.label_column)
        if notes.has_captions:
            self.captions_from = "text files beside the images" if notes.beside else told.format(notes.caption_column)

    def _classes_of(
        self, listing: Listing, label: str | None, classes: bool | None, known: Sequence[str]
    ) -> dict[str, str] | None:
        """Class of each image by its name or folder, as far as these are classes."""
        if label == PREFIX:
            self._labels_from = "the names of the files without their numbers"
            return {image: prefix_of(image) for image in listing.images}
        stray = listing.stray
        if classes is None:  # with metadata, folders only are classes if they are asked for, or those of training rows
            inside = len(stray) < len(listing.images)
            asked = label == "label" or (not stray and {*map(listing.class_folder, listing.images)} <= set(known))
            classes = inside and label is not None and (not self._metadata or asked)
        if not classes:
            return None
        if stray:
            raise UserError(
                f"{len(stray)} images lie in {self.name!r} beside its class folders, {stray[0]!r} first: "
                "move them into one, or set classes to false"
            )
        self._labels_from = "the folders" + (f" in {listing.below}" if listing.below else "")
        return {image: listing.class_folder(image) for image in listing.images}

    def _fields(self, listing: Listing, asked: set[str | None]) -> dict[str, dict[str, object]]:
        """What the JSON file beside an image says in the usual and the asked fields, by the image."""
        known = {*LABEL_COLUMNS, *CAPTION_COLUMNS, *asked}
        found = {}
        for image in listing.images:
            if (path := posixpath.splitext(image)[0] + ".json") in listing.fields:
                try:
                    found[image] = {k: v for k, v in json_fields(self._read(path)).items() if k in known}
                except ValueError as error:
                    raise UserError(
                        f"{path} of {self.name} is no JSON ({error}): repair it, or take it away"
                    ) from error
        return found

    def _read(self, path: str) -> bytes:
        """The bytes of a file."""
        if not self._zip and not self.remote:
            return Path(self._root, path).read_bytes()
        if self._zip and self._pid != os.getpid():  # open files do not survive a fork
            self._fs, self._pid = file_system(self._root, fresh=True)[0], os.getpid()
        inside, _, archive = self._root.removeprefix("zip://").partition("::")
        file = f"{self._root}/{path}" if not archive else posixpath.join(inside, path)
        return retried(file, lambda: bytes(self._fs.cat_file(file)), remote=self.remote)

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        if self.revision:  # then names say it all; other files may change under their names
            return rows_hash([self.revision, *self.files, *self._metadata.items()])
        if self._zip:
            inside = self._root.removeprefix("zip://").partition("::")[0]
            sizes = ((f, self._fs.size(posixpath.join(inside, f))) for f in self.files)
            return rows_hash([*sizes, *self._metadata.items()])
        return rows_hash([*((f, Path(self._root, f).stat().st_size) for f in self.files), *self._metadata.items()])

    def row_names(self) -> Sequence[str]:
        return self.files

    def read_row(self, row: int) -> Record:
        file, notes = self.files[row], self._notes
        inside, archive, path = self._root.removeprefix("zip://").partition("::")
        name = posixpath.join(path, inside, file) if archive else f"{self._root}/{file}"
        label = notes.labels[row] if notes.labels else None
        captions: tuple[str, ...] = () if notes.captions is None else notes.captions[row]
        try:
            if notes.beside:
                text = posixpath.splitext(file)[0] + ".txt"
                captions = text_lines(self._read(text), text) if text in self._texts else ("",)
            return Record(self._read(file), label, captions, name)
        except (OSError, KeyError) as error:
            if self.remote:
                raise
            return Record(None, label, captions, name, f"{type(error).__name__}: {error}")
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            return Record(None, label, captions, name, str(error))

    def read_block(self, block: int) -> Sequence[Record]:
        return LazyRows(len(self), self.read_row)

    def labels(self) -> Indices | None:
        labels = self._notes.labels
        return None if labels is None else label_array(labels, self.files.__getitem__, self.name)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": -1}  # a zip file is opened anew
