"""Data modules of published data sets, of folders and of files in the same formats."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from diffzoo.data.base import ImageDataModule
from diffzoo.data.folders import ImageFiles
from diffzoo.data.metadata import AUTO, Columns
from diffzoo.data.remote import hub_file_of, revision_of
from diffzoo.data.resolve import Resolved, download, downloaded, resolve, split_of
from diffzoo.data.sources import Origin, Source, SubSource, held_out
from diffzoo.data.tables import TableSource, rows_with
from diffzoo.data.tar import TarSource
from diffzoo.errors import UserError
from diffzoo.sizes import Size

__all__ = ["Cifar10", "Coco", "HFDataset", "ImageFolder", "ImageNet"]


class HFDataset(ImageDataModule):
    """Any data set of images: on the Hub, or image, Parquet, WebDataset, Arrow or zip files on this disk.

    Args:
        source: `owner/name` on the Hub, a folder, also one of `save_to_disk`, a Parquet, tar or zip file.
        config: configuration, where the data set has several.
        split: which split to train on.
        val_split: which split is held out; "auto": validation, val or test, if there is one; None: none.
        revision: commit, tag or branch. It is resolved to a commit, which checkpoints record and resume on.
        image, label, caption: columns (suffixes, for WebDataset; columns of metadata files, for single images). "auto"
            finds the usual names; None: leave out. The label "prefix" is an image's file name without its number.
        class_names: names of the classes, where the source does not say. Held-out rows are numbered as the training
            rows are.
        classes: whether the sub-folders of single images are classes; None: if there are any, and no metadata.
        where: keep only rows with these values, such as {"split": "train"} (Parquet).
        val_where: the same for held-out rows, which then may come from the same split.
        **common: see `ImageDataModule` and `Reading`.
    """

    former_names: tuple[str, ...] = ("HubImages",)  # in checkpoints of earlier versions

    def __init__(
        self,
        source: str,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = AUTO,
        revision: str | None = None,
        image: str = AUTO,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        class_names: list[str] | None = None,
        classes: bool | None = None,
        where: dict[str, Any] | None = None,
        val_where: dict[str, Any] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.classes = classes
        self.source, self.config, self.split, self.val_split, self.revision = source, config, split, val_split, revision
        self.columns = Columns(image, label, caption)
        self._class_names = class_names
        self.where, self.val_where = dict(where or {}), dict(val_where or {})

    @cached_property
    def resolved(self) -> Resolved:
        """What the place holds, at one revision."""
        return resolve(self.source, self.config, self.revision)

    @property
    def decision(self) -> str:
        """How the place was read, in words."""
        source, held_out = self.train_source, self._held_out()
        labels = f"{source.labels_from} ({_in_short(source.class_names)})" if source.class_names else "none"
        rest = f"{self.reading.val_fraction:g} of the rows" if self.reading.val_fraction else "nothing"
        return (
            f"{self.resolved}; labels: {labels}; captions: {source.captions_from or 'none'}; "
            f"held out: {held_out or rest}"
        )

    def prepare_data(self) -> None:
        """Open the source, on one process before the others need it, and say how it was read."""
        super().prepare_data()
        print(f"{self.source}: {self.decision}", flush=True)

    def _held_out(self) -> str | None:
        """The split that is held out, if one is."""
        if self.val_split != AUTO:
            return self.val_split
        return self.split if self.val_where else self.resolved.held_out(self.resolved.split(self.split))

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        train, split = self.resolved.split(self.split), self._held_out()
        if part == "validation" and split is not None:
            return self._open(self.resolved, self.resolved.split(split), self.val_where, self.class_names)
        fraction = 0.0 if split is not None else self.reading.val_fraction
        if part == "validation" and not fraction:
            return None
        source = self._open(self.resolved, train, self.where)
        if not fraction:
            return source
        out = held_out(source.row_names(), fraction, source.labels())
        return SubSource(source, out if part == "validation" else ~out, f"{part} {fraction}")

    def _open(
        self, place: Resolved, split: str, where: Mapping[str, object], like: Sequence[str] | None = None
    ) -> Source:
        """The rows of a split that have the values of `where`.

        They are numbered by `like`, the classes of the training rows; none of them leaves labels out.
        """
        columns = self.columns if like is None or like else replace(self.columns, label=None)
        names = self._class_names or like
        if where and place.kind not in ("parquet", "arrow"):
            raise UserError(f"where needs Parquet files, which {place.source} does not have")
        if place.kind == "images":
            return self._image_files(place, split, columns, names)
        if not (files := list(place.files[split])):
            raise UserError(f"{place.source} has no {place.kind} files")
        published = [found[2] for found in map(hub_file_of, files) if found]
        origin = Origin(published if len(published) == len(files) else None, revision_of(files[0]), place.licence)
        files = files if self.reading.streaming else download(files)
        if place.kind == "tar":
            source = TarSource(files, columns, place.source, names, origin)
            if columns.label == AUTO and source.folders and all(map(split_of, source.folders)):
                raise UserError(
                    f"{place.source} holds the splits {', '.join(source.folders)}: unpack it, or give a tar file of "
                    "each, such as train.tar and val.tar"
                )
            return source
        table = TableSource(files, columns, place.source, self._class_names, place.class_names, like, origin)
        return rows_with(table, where)

    def _image_files(self, place: Resolved, split: str, columns: Columns, names: Sequence[str] | None) -> ImageFiles:
        if columns.image != AUTO:
            raise UserError(
                f"image={columns.image!r} names a column, but {place.source} holds single images: leave it out"
            )
        listing = place.listings[split]
        if names and listing.below and listing.stray == list(listing.images):  # of a single class
            listing = replace(listing, below=listing.below.rstrip("/").rpartition("/")[0] + "/")
        revision = revision_of(f"{listing.root.rpartition('::')[2]}/-")
        listing = listing if self.reading.streaming or not revision else downloaded(listing)
        name = f"{place.source}/{listing.folder}" if listing.folder else place.source
        return ImageFiles(listing, columns, name, names, self.classes, Origin(None, revision, place.licence))

    def state_dict(self) -> dict[str, Any]:
        """The position, the commit of the data set, and whether rows were read singly."""
        source = self.train_source
        return {**super().state_dict(), "revision": source.revision, "random_access": source.random_access}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue on the commit of the checkpoint, also when the data set has moved on since.

        A run that read over the network may go on with downloaded files and the other way round, in the same order.
        """
        recorded = state_dict.get("revision", "")
        if (
            recorded
            and self.revision is None
            and recorded != self.train_source.revision
            and not self.reading.allow_changed_source
        ):
            self.revision = recorded
            for name in ("resolved", "train_source", "val_source", "order"):
                self.__dict__.pop(name, None)
        super().load_state_dict(state_dict)
        source = self.train_source
        if state_dict.get("random_access") and not source.random_access:
            for rows in (source, getattr(source, "base", source)):
                rows.random_access = True  # its order jumps over all rows, which must not all be held
            warnings.warn(f"{self.source} is read row by row, as its checkpoint was: streaming: false is faster")


def _in_short(names: Sequence[str]) -> str:
    """How many classes there are, and the names of the first."""
    return f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


class ImageFolder(HFDataset):
    """A folder of one's own images; sub-folders are classes, without any the data is unconditional.

    Sub-folders named `train`, `val`, `valid`, `validation` or `test` are splits. A text file beside an image, `cat.txt`
    beside `cat.jpg`, holds its captions, one per line. Labels and captions may also stand in `metadata.jsonl`, `.csv`
    or `.parquet`, as in Hugging Face's `imagefolder`: each row names an image in `file_name`, by its path from there,
    and images that no row names are left out; or in the `dataset.json` of EDM's and StyleGAN's tools.

    Args:
        path: the folder, or any other place that `HFDataset` reads.
        val_path: folder of held-out images, with the same classes.
        classes: whether sub-folders are classes; None: if there are any, and no metadata.
        label, caption: see `HFDataset`.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        classes: bool | None = None,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        **common: Any,
    ):
        super().__init__(path, classes=classes, label=label, caption=caption, **common)
        self.path, self.val_path = path, val_path

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        if self.val_path is None:
            return super().open_source(part)
        if part == "train":
            return self._open(self.resolved, self.resolved.split(self.split), {})
        place = resolve(self.val_path)
        source = self._open(place, place.splits[0], {})
        if list(source.class_names) != self.class_names:
            raise UserError(
                f"{self.val_path!r} has the classes {', '.join(source.class_names) or '(none)'} but "
                f"{self.path!r} has {', '.join(self.class_names) or '(none)'}"
            )
        return source


class ImageNet(HFDataset):
    """ImageNet-1k with its labels, at any resolution.

    The set is gated: accept its terms on its page on the Hub, then `hf auth login`.

    Args:
        source: where it is; a local copy in Parquet or as class folders works too.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "ILSVRC/imagenet-1k", val_split: str | None = "validation", image_size: Size = 256,
        batch_size: int = 256, **common: Any,
    ):  # fmt: skip
        super().__init__(
            source, val_split=val_split, image_size=image_size, batch_size=batch_size, caption=None, **common
        )


class Coco(HFDataset):
    """COCO with captions. Rows with several captions show one per visit.

    Args:
        source: a Parquet mirror; by default one with one row per caption.
        caption: its column of captions, one text or a list of texts.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "jxie/coco_captions", caption: str | None = "caption", image_size: Size = 256,
        batch_size: int = 256, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, label=None, caption=caption, **common)


class Cifar10(HFDataset):
    """CIFAR-10 at 32×32: 50,000 training and 10,000 test images in ten classes.

    Args:
        source: a folder made by `python tools/cifar10.py`, or the Hub's copy.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "uoft-cs/cifar10", image_size: Size = 32, batch_size: int = 128, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, caption=None, **common)
