"""What a place holds: a folder; a zip, tar, Parquet or Arrow file; or a data set of the Hub.

Every data module and every verb that takes a place asks `resolve`, so that they agree on its splits and its kind.
"""

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from diffzoo.data.folders import Listing, by_kind, walk
from diffzoo.data.metadata import METADATA
from diffzoo.data.remote import ACCEPT, file_system, hub_file_of, retried
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import HEAD, what_is
from diffzoo.hub import LOG_IN, hub_answers, hub_place, is_offline

__all__ = ["Resolved", "download", "downloaded", "resolve", "split_of"]

Kind = Literal["images", "parquet", "tar", "arrow"]

# the names of folders that are splits, never classes, by the split that they are
SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
SPLITS |= {"test": "test", "testing": "test"}
SHARDS: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar", ".arrow": "arrow"}
WORDS = {"images": "image files", "parquet": "Parquet files", "tar": "tar files", "arrow": "an Arrow table"}


@dataclass(frozen=True)
class Resolved:
    """What a place holds, per split, at one revision.

    source:      the place.
    kind:        what its rows are in.
    files:       paths or URLs of the shards of each split, unless the rows are single images.
    listings:    the images of each split, if they are.
    licence:     as stated, or "".
    class_names: by column, where the place says.
    unread:      files beside the images that are not read.
    """

    source: str
    kind: Kind
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    listings: Mapping[str, Listing] = field(default_factory=dict)
    licence: str = ""
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unread: Sequence[str] = ()

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.listings or self.files)

    def split(self, wanted: str) -> str:
        """The name of a split by any of its usual names.

        Raises:
            UserError: there is no such split.
        """
        for name in (wanted, SPLITS.get(wanted, wanted)):
            if name in self.splits:
                return name
        raise UserError(f"{self.source} has no split {wanted!r}{did_you_mean(wanted, self.splits)}")

    def held_out(self, train: str) -> str | None:
        """The split that validates, if there is one besides the one to train on."""
        return next((s for s in ("validation", "test") if s in self.splits and s != train), None)

    def __str__(self) -> str:
        """The place in words, such as "image files, splits train (in train), validation (in val)"."""
        counts = {s: f"in {x.folder}" if x.folder else "" for s, x in self.listings.items()}
        counts |= {s: f"{len(f)} files" for s, f in self.files.items()}
        splits = ", ".join(s + (f" ({c})" if c else "") for s, c in counts.items())
        unread = f"; not read: {by_kind(self.unread)}" if self.unread else ""
        return WORDS[self.kind] + (f", splits {splits}" if any(counts.values()) else "") + unread


def resolve(source: str, config: str | None = None, revision: str | None = None) -> Resolved:
    """Find the files of a place: a Hub name, also as the address of its page, a folder, or one file.

    Raises:
        UserError: it does not exist, is gated, has no files, or the configuration or revision is unknown.
    """
    page = hub_place(source.replace("datasets/", "", 1))
    if page is not None:
        return resolve(page.repo, config, revision or page.revision)
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            raise UserError(f"no file or folder {source!r}, and it is no name of a Hub data set (owner/name)")
        return _published(source, config, revision)
    if revision:
        raise UserError(f"{source!r} is on this disk and has no revisions: leave revision out")
    if path.is_file():
        return _file(source, path)
    files, broken = walk(path)
    names = {posixpath.basename(f) for f in files}
    if {"state.json", "dataset_info.json"} <= names and any(f.endswith(".arrow") for f in files):
        return _saved_to_disk(source, path)
    shards = [posixpath.splitext(f) for f in files if f.endswith((".parquet", ".tar"))]
    if any(posixpath.basename(stem) + suffix not in METADATA for stem, suffix in shards):
        tars, tables = ({stem for stem, suffix in shards if suffix == kind} for kind in (".tar", ".parquet"))
        return _published(source, config, None, tars_alone=bool(tars & tables))
    return _images(source, Listing.of(str(path), files, broken))


def _file(source: str, path: Path) -> Resolved:
    suffix = path.suffix.lower()
    if suffix in SHARDS:
        return Resolved(source, SHARDS[suffix], {"train": [str(path)]})
    if suffix != ".zip":
        with path.open("rb") as file:
            no = "no Parquet, tar, Arrow or zip file: give one, or the folder of the images"
            raise UserError(f"{source!r} is {what_is(file.read(HEAD), no)}")
    return _zip(source, str(path))


def _zip(source: str, file: str) -> Resolved:
    root = f"zip://::{file}"
    try:
        inside = sorted(file_system(root, fresh=True)[0].find(""))
    except Exception as error:
        head = Path(file).read_bytes()[:HEAD] if Path(file).is_file() else b""
        what = what_is(head, f"no zip file, or it is damaged ({error})")
        raise UserError(f"{source!r} is {what}") from error
    return _images(source, Listing.of(root, [f for f in inside if not re.search(r"(^|/)(\.|__MACOSX/)", f)]))


def _images(source: str, whole: Listing) -> Resolved:
    """Single images: their splits by folder. One folder around everything is looked into."""
    if not whole.images:
        return Resolved(source, "images", listings={"train": whole})
    below, images = "", whole.images
    while True:
        tops = {image.split("/")[0] for image in images if "/" in image}
        stray = any("/" not in image for image in images)
        known = {top: split for top in sorted(tops) if (split := split_of(top))}
        if known and not stray and (known.keys() == tops or {"train"} < set(known.values())):
            listings = _splits(whole, below, known)
            outside = [image for image in whole.images if not image.startswith(tuple(f"{below}{k}/" for k in known))]
            return Resolved(source, "images", listings=listings, unread=[*whole.unread, *outside])
        inner = [image.split("/", 1)[1] for image in images if "/" in image]
        if stray or len(tops) > 1 or any("/" not in image for image in inner):
            break
        below, images = f"{below}{next(iter(tops))}/", inner
    return Resolved(source, "images", listings={"train": replace(whole, below=below)}, unread=whole.unread)


def split_of(folder: str) -> str | None:
    """The split that a folder is by its name, such as "val", "train2017" or "test_images"."""
    return SPLITS.get(re.sub(r"[\W_]*(?:\d{4}|images?|imgs?|set|data)$", "", folder.lower()))


def _splits(whole: Listing, below: str, known: Mapping[str, str]) -> dict[str, Listing]:
    order = sorted(known, key=lambda folder: ("train", "validation", "test").index(known[folder]))
    splits: dict[str, Listing] = {}
    for folder in order:
        splits[known[folder] if known[folder] not in splits else folder] = whole.split(below + folder)
    return splits


def _saved_to_disk(source: str, path: Path) -> Resolved:
    """A folder written by `save_to_disk` of `datasets`: one split, or a folder for each."""
    index = path / "dataset_dict.json"
    parts = {s: path / s for s in json.loads(index.read_text())["splits"]} if index.is_file() else {"train": path}
    files = {}
    for split, folder in parts.items():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files[split] = [str(folder / part["filename"]) for part in state["_data_files"]]
    first = next(iter(parts.values())) / "dataset_info.json"
    return Resolved(source, "arrow", files, licence=json.loads(first.read_text(encoding="utf-8")).get("license") or "")


def _published(source: str, config: str | None, revision: str | None, tars_alone: bool = False) -> Resolved:
    """A data set of the Hub, or a folder of its shards, by the rules of `datasets`.

    With `tars_alone` the tables in a folder are none of it: img2dataset writes one of addresses beside each tar file.
    """
    from datasets import config as client
    from datasets import get_dataset_config_names, load_dataset_builder

    path = Path(source).expanduser()
    place = str(path) if path.exists() else source
    # the client tries again for half a minute before it says so
    if not path.exists() and not is_offline() and (reason := hub_answers(client.HF_ENDPOINT)):
        raise UserError(f"could not reach the Hub ({reason}) for the data set {source!r}{_no_folder(source)}")
    try:
        asked = {"path": "webdataset", "data_dir": place} if tars_alone else {"path": place}
        builder = retried(source, lambda: load_dataset_builder(**asked, name=config, revision=revision))
    except UserError:
        raise
    except Exception as error:
        known = []
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            known = get_dataset_config_names(place, revision=revision)
        raise _explain(error, source, config, revision, known) from error
    files = {str(k): list(map(str, v)) for k, v in (builder.config.data_files or {}).items()}
    files = {k: [f for f in v if not tars_alone or f.endswith(".tar")] for k, v in files.items()}
    names = {c: list(f.names) for c, f in (builder.info.features or {}).items() if hasattr(f, "names")}
    licence = str(builder.info.license or "")
    shards = [Path(f).suffix.lower() for part in files.values() for f in part if Path(f).name not in METADATA]
    if shards and shards[0] in SHARDS:
        return Resolved(source, SHARDS[shards[0]], files, licence=licence, class_names=names)
    listings = {s: _listing(f, source) for s, f in files.items()}
    return Resolved(source, "images", listings=listings, licence=licence, class_names=names)


def _listing(files: Sequence[str], source: str) -> Listing:
    """The listing of image files of the Hub, or of the files in a zip file there."""
    if len(files) == 1 and files[0].endswith(".zip"):
        return next(iter(_zip(source, files[0]).listings.values()))
    paths = [found[2] for found in map(hub_file_of, files) if found]
    listing = Listing.of(files[0].removesuffix("/" + paths[0]), paths)
    listing = replace(listing, fields=frozenset())  # each would be a request of its own before training
    below = posixpath.commonpath([posixpath.dirname(i) for i in listing.images]) if listing.images else ""
    return replace(listing, below=below + "/" if below else "")


def downloaded(listing: Listing) -> Listing:
    """The same with every file of the Hub fetched into its cache."""
    if listing.root.startswith("zip://"):
        inside, _, file = listing.root.partition("::")
        return replace(listing, root=f"{inside}::{download([file])[0]}")
    paths = [*listing.images, *listing.texts, *listing.tables]
    return replace(listing, root=download([f"{listing.root}/{p}" for p in paths])[0].removesuffix("/" + paths[0]))


def _explain(error: Exception, source: str, config: str | None, revision: str | None, known: list[str]) -> UserError:
    """What to do about a data set that cannot be opened."""
    text = " ".join(str(error).split())
    if "gated" in text.lower():
        return UserError(f"the data set {source} is gated: {ACCEPT}")
    if known:
        return UserError(f"{source} needs one of its configurations, got {config!r}: {', '.join(known)}")
    if "revision" in text.lower() and revision:
        return UserError(f"the data set {source} has no revision {revision!r}")
    if "offline" in text.lower():
        return UserError(f"the data set {source} is not on this disk and the Hub is switched off (HF_HUB_OFFLINE)")
    name = type(error).__name__
    if name in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return UserError(f"{source!r} holds no data files: expected Parquet, tar or image files")
    if name == "DatasetNotFoundError":
        return UserError(
            f"no data set {source!r} on the Hub, or it is private{_no_folder(source)}: check the name, or {LOG_IN}"
        )
    return UserError(f"could not open the data set {source!r}: {type(error).__name__}: {text[:300]}")


def _no_folder(source: str) -> str:
    """A remark that there is no such folder either, which a name may have meant."""
    return f", and there is no file or folder {source!r}"


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
