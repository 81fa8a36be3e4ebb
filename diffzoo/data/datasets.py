"""Published data sets, and local files in the same formats, by a column mapping."""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffzoo.data.base import ImageDataModule
from diffzoo.data.parquet import Columns, ParquetSource
from diffzoo.data.remote import LOG_IN, file_system, hub_file_of, retried, revision_of
from diffzoo.data.sources import (
    AUTO,
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    METADATA,
    FolderSource,
    Indices,
    LazyRows,
    Notes,
    Record,
    Source,
    below_common_folder,
    pick,
    rows_hash,
)
from diffzoo.data.tar import TarSource
from diffzoo.errors import UserError, did_you_mean
from diffzoo.images import SUFFIXES

__all__ = ["Cifar10", "Coco", "HFDataset", "ImageNet"]

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
VALIDATION_SPLITS = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class Resolved:
    """The files of a data set, per split, at one revision."""

    splits: Mapping[str, Sequence[str]]
    licence: str
    class_names: Mapping[str, Sequence[str]]

    def files(self, split: str, name: str) -> list[str]:
        if split not in self.splits:
            raise UserError(f"{name} has no split {split!r}{did_you_mean(split, self.splits)}")
        return list(self.splits[split])


def resolve(source: str, config: str | None = None, revision: str | None = None) -> Resolved:
    """Find the files of a data set: a Hub name, a folder, or one file.

    Raises:
        UserError: it does not exist, is gated, has no files, or the configuration or revision is unknown.
    """
    from datasets import get_dataset_config_names, load_dataset_builder

    local = Path(source).exists()
    if local and revision:
        raise UserError(f"{source!r} is on this disk and has no revisions: leave revision out")
    if not local and (source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise UserError(f"no file or folder {source!r}, and it is no name of a Hub data set (owner/name)")
    try:
        if Path(source).is_file():
            kind = "webdataset" if source.endswith(".tar") else "parquet"
            builder = load_dataset_builder(kind, data_files={"train": [source]})
        else:
            builder = retried(source, lambda: load_dataset_builder(source, config, revision=revision))
    except UserError:
        raise
    except Exception as error:
        known = []
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            known = get_dataset_config_names(source, revision=revision)
        raise _explain(error, source, config, revision, known) from error
    files = builder.config.data_files or {}
    names = {c: list(f.names) for c, f in (builder.info.features or {}).items() if hasattr(f, "names")}
    return Resolved({str(k): list(map(str, v)) for k, v in files.items()}, str(builder.info.license or ""), names)


def _explain(error: Exception, source: str, config: str | None, revision: str | None, known: list[str]) -> UserError:
    """What to do about a data set that cannot be opened."""
    text = " ".join(str(error).split())
    if "gated" in text.lower():
        return UserError(f"the data set {source} is gated: {LOG_IN}")
    if known:
        return UserError(f"{source} needs one of its configurations, got {config!r}: {', '.join(known)}")
    if "revision" in text.lower() and revision:
        return UserError(f"the data set {source} has no revision {revision!r}")
    if "offline" in text.lower():
        return UserError(f"the data set {source} is not on this disk and the Hub is switched off (HF_HUB_OFFLINE)")
    name = type(error).__name__
    if name in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return UserError(f"{source!r} holds no data files: expected Parquet, tar or picture files")
    if "Couldn't reach" in text:  # after the client's own attempts
        return UserError(
            f"could not reach the Hub for the data set {source!r}{_no_folder(source)}: check the connection"
        )
    if name == "DatasetNotFoundError":
        return UserError(
            f"no data set {source!r} on the Hub, or it is private{_no_folder(source)}: check the name, or log in with "
            "`hf auth login`"
        )
    return UserError(f"could not open the data set {source!r}: {type(error).__name__}: {text[:300]}")


def _no_folder(source: str) -> str:
    """That there is no such folder either, where the name may have meant one."""
    return f", and there is no file or folder {source!r}" if Path(source).parent.is_dir() else ""


def download(files: Sequence[str]) -> list[str]:
    """Fetch Hub files into the Hub cache; their local paths. Local files stay where they are."""
    from huggingface_hub import hf_hub_download

    paths = []
    for file in files:
        published = hub_file_of(file)
        if published is None:
            paths.append(file)
            continue
        repo, revision, name = published
        paths.append(
            retried(file, lambda r=repo, v=revision, n=name: hf_hub_download(r, n, repo_type="dataset", revision=v))  # type: ignore[misc]
        )
    return paths


class PictureFiles(Source):
    """Single pictures on a file system; the folder of each is its class, unless metadata files say more.

    Args:
        files: paths or URLs of the pictures and of their metadata files, if any; see `Notes`.
        name: for messages.
        label, caption: see `Notes`.
        class_names: names of the classes, or of those of the training rows; None: the folders, if there are several.
        paths: what the files are called where they are published; None: their paths below their common folder.
        revision, licence: as published.
    """

    random_access = True

    def __init__(
        self,
        files: Sequence[str],
        name: str,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        class_names: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        revision: str = "",
        licence: str = "",
    ):
        at = dict(sorted(zip(paths or below_common_folder(files), files, strict=True)))
        pictures = [path for path in at if Path(path).suffix.lower() in SUFFIXES]
        if not pictures:
            raise UserError(f"{name} has no Parquet, tar or picture files")
        self.name, self.revision, self.licence = name, revision, licence
        self._fs, self.remote = file_system(files[0])
        metadata = {path: self._bytes(file) for path, file in at.items() if Path(path).name in METADATA}
        several = len({Path(path).parent for path in pictures}) > 1 or class_names
        class_of = _parent_folder if several and (not metadata or label == "label") else None
        self._notes = Notes(pictures, metadata, class_of, False, name, label, caption, class_names)
        self.files = [at[path] for path in self._notes.files]
        self.class_names, self.has_captions = self._notes.class_names, self._notes.has_captions
        self.block_sizes = np.array([len(self.files)])
        # of a revision the names say it all; other files may change under their names
        sizes = [] if revision else [self._fs.size(file) for file in self.files]
        self.rows_hash = rows_hash([revision, *self._notes.files, *sizes, *metadata.items()])

    def _bytes(self, file: str) -> bytes:
        return retried(file, lambda: bytes(self._fs.cat_file(file)), remote=self.remote)

    def read_row(self, row: int) -> Record:
        notes = self._notes
        label = None if notes.labels is None else notes.labels[row]
        captions = () if notes.captions is None else notes.captions[row]
        return Record(self._bytes(self.files[row]), label, captions, self.files[row])

    def read_block(self, block: int) -> Sequence[Record]:
        return LazyRows(len(self), self.read_row)

    def labels(self) -> Indices | None:
        return self._notes.label_array(self.name)


def _parent_folder(file: str) -> str:
    return Path(file).parent.name


class HFDataset(ImageDataModule):
    """Any data set of pictures: on the Hub, or Parquet, WebDataset or picture files on this disk.

    Args:
        source: `owner/name` on the Hub, a folder, a Parquet or a tar file.
        config: configuration, where the data set has several.
        split: which split to train on.
        val_split: which split is held out; "auto": validation, val or test, if there is one; None: none.
        revision: commit, tag or branch. It is resolved to a commit, which checkpoints record and resume on.
        image, label, caption: columns (suffixes, for WebDataset; columns of metadata files, for pictures). "auto" finds
            the usual names; None: leave out.
        class_names: names of the classes, where the source does not say. Held-out rows are numbered as the training
            rows are.
        where: keep only rows with these values, such as {"split": "train"} (Parquet).
        val_where: the same for held-out rows, which then may come from the same split.
        streaming: read over the network as needed; False: download into the Hub cache first.
        **common: see `ImageDataModule`.
    """

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
        where: dict[str, Any] | None = None,
        val_where: dict[str, Any] | None = None,
        streaming: bool = True,
        **common: Any,
    ):
        super().__init__(**common)
        self.source, self.config, self.split, self.val_split, self.revision = source, config, split, val_split, revision
        self.columns: dict[str, str | None] = {"image": image, "label": label, "caption": caption}
        self._class_names, self.streaming = class_names, streaming
        self.where, self.val_where = dict(where or {}), dict(val_where or {})

    @cached_property
    def resolved(self) -> Resolved:
        """The files at one revision."""
        return resolve(self.source, self.config, self.revision)

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        if part == "train":
            return self._open(self.split, self.where, self.columns["label"], None)
        split = self.val_split
        if self.val_where and split == AUTO:
            split = self.split
        if split == AUTO:
            split = next((s for s in VALIDATION_SPLITS if s in self.resolved.splits and s != self.split), None)
        if split is None:
            return None
        like = self.class_names  # of the training rows: the same class has the same number
        return self._open(split, self.val_where, self.columns["label"] if like else None, like)

    def _open(self, split: str, where: Mapping[str, Any], label: str | None, like: Sequence[str] | None) -> Source:
        files = self.resolved.files(split, self.source)
        published = [hub_file_of(file) for file in files]
        revision = revision_of(files[0]) if files else ""
        shared: dict[str, Any] = {
            "revision": revision,
            "licence": self.resolved.licence,
            "name": self.source,
            "paths": [p[2] for p in published if p] if all(published) else None,
        }
        suffixes = [Path(file).suffix.lower() for file in files if Path(file).name not in METADATA]
        if not self.streaming:
            files = download(files)
        if suffixes and suffixes[0] == ".parquet":
            return self._parquet(files, where, label, like, shared)
        if where:
            raise UserError(f"where needs Parquet files, which {self.source} does not have")
        names = self._class_names or like
        if suffixes and suffixes[0] == ".tar":
            return self._tar(files, label, names, shared)
        if self.columns["image"] != AUTO:
            raise UserError(
                f"image={self.columns['image']!r} names a column, but {self.source} holds single pictures: leave it out"
            )
        notes: dict[str, Any] = {"label": label, "caption": self.columns["caption"], "class_names": names}
        if revision or not Path(self.source).is_dir():
            return PictureFiles(files, **notes, **shared)
        return FolderSource(_split_folder(self.source, files), **notes)

    def _parquet(
        self,
        files: list[str],
        where: Mapping[str, Any],
        label: str | None,
        like: Sequence[str] | None,
        shared: dict[str, Any],
    ) -> ParquetSource:
        known = ParquetSource.columns_of(files[0])
        columns = Columns(
            pick(self.columns["image"], IMAGE_COLUMNS, known) or "image",
            pick(label, LABEL_COLUMNS, known),
            pick(self.columns["caption"], CAPTION_COLUMNS, known),
            where,
        )
        names = self._class_names or self.resolved.class_names.get(columns.label or "")
        return ParquetSource(files, columns, class_names=names, like=like, **shared)

    def _tar(
        self, files: list[str], label: str | None, class_names: Sequence[str] | None, shared: dict[str, Any]
    ) -> TarSource:
        known = TarSource(files[:1], self.source, revision=shared["revision"]).columns()
        return TarSource(
            files,
            image=pick(self.columns["image"], (), known),
            label=pick(label, LABEL_COLUMNS, known),
            caption=pick(self.columns["caption"], CAPTION_COLUMNS, known),
            class_names=class_names,
            **shared,
        )

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
            and not self.allow_changed_source
        ):
            self.revision = recorded
            for name in ("resolved", "train_source", "val_source", "order"):
                self.__dict__.pop(name, None)
        super().load_state_dict(state_dict)
        source = self.train_source
        if state_dict.get("random_access") and not source.random_access:
            source.random_access = True  # its order jumps over all rows, which must not all be held
            warnings.warn(f"{self.source} is read row by row, as its checkpoint was: streaming: false is faster")


def _split_folder(source: str, files: Sequence[str]) -> str:
    """The folder of a split: the innermost that holds all its files and is named as splits are; else the whole."""
    root = Path(source).resolve()
    inside = Path(os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])).relative_to(root)
    names = {"train", "training", *VALIDATION_SPLITS}
    return str(Path(source, *next((p.parts for p in [inside, *inside.parents] if p.name in names), ())))


class ImageNet(HFDataset):
    """ImageNet-1k with its labels, at any resolution.

    The set is gated: accept its terms on its page on the Hub, then `hf auth login`.

    Args:
        source: where it is; a local copy in Parquet or as class folders works too.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "ILSVRC/imagenet-1k", val_split: str | None = "validation", image_size: int = 256,
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
        self, source: str = "jxie/coco_captions", caption: str | None = "caption", image_size: int = 256,
        batch_size: int = 256, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, label=None, caption=caption, **common)


class Cifar10(HFDataset):
    """CIFAR-10 at 32×32: 50,000 training and 10,000 test pictures in ten classes.

    Args:
        source: a folder made by `python tools/cifar10.py`, or the Hub's copy.
        **common: see `HFDataset` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "uoft-cs/cifar10", image_size: int = 32, batch_size: int = 128, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, caption=None, **common)
