"""Published data sets, and local files in the same formats, by a column mapping."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffzoo.data.base import ImageDataModule
from diffzoo.data.parquet import Columns, ParquetSource
from diffzoo.data.remote import file_system, retried, revision_of
from diffzoo.data.sources import SUFFIXES, FolderSource, Indices, Record, Source, _Lazy, fingerprint
from diffzoo.data.tar import TarSource
from diffzoo.errors import UserError, did_you_mean

__all__ = ["Cifar10", "Coco", "HubImages", "ImageNet"]

AUTO = "auto"
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences")
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
        return UserError(
            f"the data set {source} is gated: accept its conditions on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
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
        match = re.match(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)", file)
        if not match:
            paths.append(file)
            continue
        repo, revision, name = match.groups()
        paths.append(
            retried(file, lambda r=repo, v=revision, n=name: hf_hub_download(r, n, repo_type="dataset", revision=v))  # type: ignore[misc]
        )
    return paths


class PictureFiles(Source):
    """Single pictures on a file system; the folder of each is its class.

    Args:
        files: paths or URLs.
        name: for messages.
        class_names: names of the classes; None: the folders, if there are several.
        revision, licence: as published.
    """

    random_access = True

    def __init__(
        self,
        files: Sequence[str],
        name: str,
        class_names: Sequence[str] | None = None,
        revision: str = "",
        licence: str = "",
    ):
        self.files = sorted(f for f in files if Path(f).suffix.lower() in SUFFIXES)
        if not self.files:
            raise UserError(f"{name} has no Parquet, tar or picture files")
        self.name, self.revision, self.licence = name, revision, licence
        self._fs, self.remote = file_system(self.files[0])
        folders = sorted({Path(f).parent.name for f in self.files})
        self.class_names = list(class_names) if class_names is not None else folders if len(folders) > 1 else []
        self.block_sizes = np.array([len(self.files)])
        self.fingerprint = fingerprint([revision, *self.files])

    def _label(self, file: str) -> int | None:
        return self.class_names.index(Path(file).parent.name) if self.class_names else None

    def read_row(self, row: int) -> Record:
        file = self.files[row]
        return Record(retried(file, lambda: bytes(self._fs.cat_file(file))), self._label(file), (), file)

    def read_block(self, block: int) -> Sequence[Record]:
        return _Lazy(len(self), self.read_row)

    def labels(self) -> Indices | None:
        if not self.class_names:
            return None
        return np.array([self._label(f) for f in self.files], dtype=np.int64)


class HubImages(ImageDataModule):
    """Any data set of pictures: on the Hub, or Parquet, WebDataset or picture files on this disk.

    Args:
        source: `owner/name` on the Hub, a folder, a Parquet or a tar file.
        config: configuration, where the data set has several.
        split: which split to train on.
        val_split: which split is held out; "auto": validation, val or test, if there is one; None: none.
        revision: commit, tag or branch. It is resolved to a commit, which checkpoints record and resume on.
        image, label, caption: columns (suffixes, for WebDataset). "auto" finds the usual names; None: leave out.
        class_names: names of the classes, where the source does not say.
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
            return self._open(self.split, self.where)
        split = self.val_split
        if self.val_where and split == AUTO:
            split = self.split
        if split == AUTO:
            split = next((s for s in VALIDATION_SPLITS if s in self.resolved.splits and s != self.split), None)
        return None if split is None else self._open(split, self.val_where)

    def _open(self, split: str, where: Mapping[str, Any]) -> Source:
        files = self.resolved.files(split, self.source)
        revision = revision_of(files[0]) if files else ""
        shared: dict[str, Any] = {"revision": revision, "licence": self.resolved.licence, "name": self.source}
        suffix = Path(files[0]).suffix.lower() if files else ""
        if not self.streaming:
            files = download(files)
        if suffix == ".parquet":
            return self._parquet(files, where, shared)
        if where:
            raise UserError(f"where needs Parquet files, which {self.source} does not have")
        if suffix == ".tar":
            return self._tar(files, shared)
        if revision or not Path(self.source).is_dir():
            return PictureFiles(files, class_names=self._class_names, **shared)
        return FolderSource(_split_folder(self.source, files))

    def _parquet(self, files: list[str], where: Mapping[str, Any], shared: dict[str, Any]) -> ParquetSource:
        known = ParquetSource.columns_of(files[0])
        columns = Columns(
            _pick(self.columns["image"], IMAGE_COLUMNS, known) or "image",
            _pick(self.columns["label"], LABEL_COLUMNS, known),
            _pick(self.columns["caption"], CAPTION_COLUMNS, known),
            where,
        )
        names = self._class_names or self.resolved.class_names.get(columns.label or "")
        return ParquetSource(files, columns, class_names=names, **shared)

    def _tar(self, files: list[str], shared: dict[str, Any]) -> TarSource:
        known = TarSource(files[:1], self.source, revision=shared["revision"]).columns()
        image = self.columns["image"]
        return TarSource(
            files,
            image=None if image == AUTO else image,
            label=_pick(self.columns["label"], LABEL_COLUMNS, known),
            caption=_pick(self.columns["caption"], CAPTION_COLUMNS, known),
            class_names=self._class_names,
            **shared,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and the commit of the data set."""
        return {**super().state_dict(), "revision": self.train_source.revision}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue on the commit of the checkpoint, also when the data set has moved on since."""
        recorded = state_dict.get("revision", "")
        if recorded and self.revision is None and recorded != self.train_source.revision and not self._allow_changed:
            self.revision = recorded
            for name in ("resolved", "train_source", "val_source", "order"):
                self.__dict__.pop(name, None)
        super().load_state_dict(state_dict)


def _pick(wanted: str | None, usual: Sequence[str], known: Sequence[str]) -> str | None:
    """The column itself, or for "auto" the first usual name that is there."""
    return next((c for c in usual if c in known), None) if wanted == AUTO else wanted


def _split_folder(source: str, files: Sequence[str]) -> str:
    """The folder of a split: the sub-folder named after it, where there is one."""
    tops = {Path(f).resolve().relative_to(Path(source).resolve()).parts[0] for f in files}
    names = {"train", "training", *VALIDATION_SPLITS}
    return str(Path(source) / tops.pop()) if len(tops) == 1 and tops <= names else source


class ImageNet(HubImages):
    """ImageNet-1k with its labels, at any resolution.

    The set is gated: accept its terms on its page on the Hub, then `hf auth login`.

    Args:
        source: where it is; a local copy in Parquet or as class folders works too.
        **common: see `HubImages` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "ILSVRC/imagenet-1k", val_split: str | None = "validation", image_size: int = 256,
        batch_size: int = 256, **common: Any,
    ):  # fmt: skip
        super().__init__(
            source, val_split=val_split, image_size=image_size, batch_size=batch_size, caption=None, **common
        )


class Coco(HubImages):
    """COCO with captions. Rows with several captions show one per visit.

    Args:
        source: a Parquet mirror; by default one with one row per caption.
        caption: its column of captions, one text or a list of texts.
        **common: see `HubImages` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "jxie/coco_captions", caption: str | None = "caption", image_size: int = 256,
        batch_size: int = 256, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, label=None, caption=caption, **common)


class Cifar10(HubImages):
    """CIFAR-10 at 32×32: 50,000 training and 10,000 test pictures in ten classes.

    Args:
        source: a folder made by `python -m diffzoo.data.cifar10`, or the Hub's copy.
        **common: see `HubImages` and `ImageDataModule`.
    """

    def __init__(
        self, source: str = "uoft-cs/cifar10", image_size: int = 32, batch_size: int = 128, **common: Any,
    ):  # fmt: skip
        super().__init__(source, image_size=image_size, batch_size=batch_size, caption=None, **common)
