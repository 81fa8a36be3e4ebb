"""Cached latents: the autoencoder's moments of every image and its mirror image, with a record of their origin.

A cache is a folder with `train/` and perhaps `validation/`; each holds `cache_metadata.json` and shards
`latents-00000.safetensors` of `moments (n, flips, 2 c, h, w)` float16 (mean, then standard deviation), `label (n,)` and
the source's `row (n,)`. The header holds, as JSON under "diffzoo", the captions, the reasons for rows left out, and the
mark of the metadata that the shard belongs to. `diffzoo data encode` writes these files; when every shard is there, the
metadata get the number of images and a hash of their rows. A cache whose shards disagree with it is refused.

A cache in aspect buckets has a folder like this for each bucket in `train/`, named by its size in pixels.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from diffzoo.data.base import ImageDataModule
from diffzoo.data.batches import BatchMaker, Sample
from diffzoo.data.order import Place
from diffzoo.data.sources import Indices, Record, Source, ids_hash, rows_hash
from diffzoo.data.transforms import augment
from diffzoo.errors import UserError
from diffzoo.record import from_plain, to_plain
from diffzoo.sizes import Size, as_size, size_text

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = ["CacheMetadata", "LatentSource", "Latents", "header", "open_shard", "read_cache_metadata", "shard_name"]

CACHE_METADATA = "passport.json"
HEADER = "diffzoo"  # one entry: safetensors writes several in any order
VERSION = 2


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"latents-{index:05d}.safetensors"


def open_shard(folder: Path, index: int) -> "safe_open":
    """An open shard.

    Raises:
        UserError: it is damaged.
    """
    from safetensors import safe_open

    path = folder / shard_name(index)
    try:
        return safe_open(path, framework="np")
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}): delete it and encode again") from error


class Header(TypedDict):
    """What a shard says besides its tensors.

    captions: of each row.
    bad:      why a row was left out, by its number.
    passport: the mark of the metadata that it belongs to.
    """

    captions: list[list[str]]
    bad: dict[str, str]
    passport: str


def header(shard: "safe_open") -> Header:
    """What an open shard says."""
    found = json.loads((shard.metadata() or {}).get(HEADER, "{}"))
    return cast(Header, {"captions": [], "bad": {}, "passport": "", **found})


@dataclass(frozen=True)
class CacheMetadata:
    """What a cache was made from.

    source, revision, rows_hash: the rows.
    image_size, resize, fast_jpeg: how images were decoded and cropped, in pixels.
    flips:               1, or 2 with mirror images.
    autoencoder, autoencoder_hash: what encoded them.
    rows, shard_rows:    rows of the source, and how many of them a shard takes.
    class_names, has_captions: as the source has them.
    licence:             of the source.
    images, ids:       how many were encoded, and `ids_hash` of their rows; None and "" until all are.
    """

    source: str
    revision: str
    rows_hash: str = field(metadata={"key": "source_fingerprint"})
    image_size: Size
    resize: str
    fast_jpeg: bool
    flips: int
    autoencoder: str
    autoencoder_hash: str
    rows: int
    shard_rows: int
    class_names: tuple[str, ...]
    has_captions: bool
    licence: str
    version: int = VERSION
    images: int | None = field(default=None, metadata={"key": "pictures"})
    ids: str = ""

    @property
    def shards(self) -> int:
        """How many shards the cache has when it is complete."""
        return -(-self.rows // self.shard_rows)

    @property
    def begun(self) -> "CacheMetadata":
        """The metadata as they were before anything was encoded."""
        return replace(self, images=None, ids="")

    @property
    def mark(self) -> str:
        """What shards carry to say that they belong to it."""
        return rows_hash([self.begun.to_json()])

    def to_json(self) -> str:
        return json.dumps(to_plain(self), indent=1)

    def present(self, folder: Path) -> list[int]:
        """The shards that are there."""
        return [k for k in range(self.shards) if (folder / shard_name(k)).is_file()]


def read_cache_metadata(folder: Path) -> CacheMetadata:
    """The metadata of a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / CACHE_METADATA
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["version"]
    except FileNotFoundError:
        raise UserError(
            f"no latents in {str(folder)!r}: make them with `diffzoo data encode SOURCE --out {folder.parent}`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the metadata {str(path)!r} are damaged ({error}): encode again") from error
    if version != VERSION:
        raise UserError(
            f"the latents in {str(folder)!r} have format {version}, and this diffzoo reads format {VERSION}: "
            "encode again into another folder"
        )
    return from_plain(CacheMetadata, values, str(path))


def _opened(folder: Path, made: CacheMetadata) -> "list[safe_open]":
    """All shards of a cache.

    Raises:
        UserError: one is missing, damaged or of another cache.
    """
    missing = made.shards - len(made.present(folder))
    if missing or made.images is None:
        raise UserError(
            f"the latents in {str(folder)!r} are incomplete, {missing} of {made.shards} shards are missing: "
            "run the same `diffzoo data encode` command again, it goes on where it stopped"
        )
    shards = [open_shard(folder, k) for k in range(made.shards)]
    shape = shards[0].get_slice("moments").get_shape()[2:]
    for k, shard in enumerate(shards):
        wanted = [*shard.get_slice("row").get_shape(), made.flips, *shape]
        if (header(shard)["passport"], shard.get_slice("moments").get_shape()) != (made.mark, wanted):
            raise UserError(
                f"{folder / shard_name(k)} does not belong to the cache that its metadata describe: delete it and "
                "encode again"
            )
    rows = np.concatenate([shard.get_tensor("row") for shard in shards])
    images, ids = len(rows), ids_hash(rows)
    if (images, ids) != (made.images, made.ids):
        raise UserError(
            f"the shards in {str(folder)!r} hold {images} images (rows {ids[:12]}), but their metadata say "
            f"{made.images} (rows {made.ids[:12]}): delete the folder and encode again"
        )
    return shards


class LatentSource(Source):
    """The rows of a complete cache.

    Raises:
        UserError: the cache is missing, incomplete or damaged, or its shards disagree with its metadata.
    """

    random_access = True

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        self.cache_metadata = made = read_cache_metadata(folder)
        self.class_names, self.has_captions = list(made.class_names), made.has_captions
        self.licence, self.revision = made.licence, made.revision
        shards = _opened(folder, made)
        self.block_sizes = np.array([shard.get_slice("row").get_shape()[0] for shard in shards], dtype=np.int64)
        self.shape: tuple[int, ...] = tuple(shards[0].get_slice("moments").get_shape()[2:])  # of an image: 2 c, h, w
        self._open: dict[int, safe_open] = {}

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        return rows_hash([self.cache_metadata.to_json()])

    @property
    def made_from(self) -> list[CacheMetadata]:
        """The metadata of every cache in it."""
        return [self.cache_metadata]

    @cached_property
    def _labels(self) -> Indices:
        shards = range(self.cache_metadata.shards)
        return np.concatenate([open_shard(self.folder, k).get_tensor("label") for k in shards])

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        return [int(self._labels[row]) for row in rows] if self.class_names else None

    @cached_property
    def _captions(self) -> list[list[list[str]]]:
        return [header(open_shard(self.folder, k))["captions"] for k in range(self.cache_metadata.shards)]

    def moments(self, row: int, mirrored: bool) -> NDArray[np.float16]:
        """Mean and standard deviation `(2 c, h, w)`, float16."""
        shard, within = self.locate(row)
        if shard not in self._open:
            self._open[shard] = open_shard(self.folder, shard)
        return np.asarray(self._open[shard].get_slice("moments")[within, int(mirrored)])

    def read_row(self, row: int) -> Record:
        shard, within = self.locate(row)
        captions = tuple(self._captions[shard][within]) if self.has_captions else ()
        label = int(self._labels[row]) if self.class_names else None
        return Record(None, label, captions, f"{self.name} row {row}")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


class LatentBuckets(Source):
    """The rows of several caches, one for each bucket.

    Args:
        parts: the caches in the order of the buckets.
        name: for messages.
    """

    random_access = True

    def __init__(self, parts: Sequence[LatentSource], name: str):
        self.say_as(parts[0])
        self.parts, self.name = parts, name
        self.block_sizes = np.array([len(part) for part in parts], dtype=np.int64)

    @cached_property
    def rows_hash(self) -> str:  # type: ignore[override]
        return rows_hash(part.rows_hash for part in self.parts)

    @property
    def made_from(self) -> list[CacheMetadata]:
        """As that of `LatentSource`."""
        return [part.cache_metadata for part in self.parts]

    def label_values(self, rows: Iterable[int]) -> Sequence[int | None] | None:
        labels = np.concatenate([part._labels for part in self.parts]) if self.class_names else None
        return None if labels is None else [int(labels[row]) for row in rows]

    def moments(self, row: int, mirrored: bool) -> NDArray[np.float16]:
        """As those of `LatentSource`."""
        part, within = self.locate(row)
        return self.parts[part].moments(within, mirrored)

    def read_row(self, row: int) -> Record:
        part, within = self.locate(row)
        return self.parts[part].read_row(within)


class _MomentMaker(BatchMaker):
    """Batches of moments."""

    key = "moments"
    source: LatentSource | LatentBuckets

    def _sample(self, place: Place) -> Sample:
        _, mirrored = augment(self.transform.seed, place.row, place.visit, "center", self.transform.flip)
        record = self._one_caption(self.source.read_row(place.row), place.row, place.visit)
        return self.source.moments(place.row, mirrored), record, place.row


def _listed(sizes: Iterable[Size]) -> str:
    return ", ".join(str(s if isinstance(s, int) else list(s)) for s in sizes)


class Latents(ImageDataModule):
    """Latents cached by `diffzoo data encode`.

    Batches hold `moments` `(b, 2 c, h, w)` float16, mean and standard deviation; drawing from them is the training
    step's. Training refuses a cache that was made by another autoencoder than the model's.

    Args:
        path: the cache.
        image_size: height and width of the latents, in latent pixels.
        buckets: those of a cache in buckets, in latent pixels; held-out latents keep `image_size`.
        pixels: refuse a cache of images of another size than this, in pixels.
        resize: refuse a cache that was made with another resize method than this; None: take what there is.
        flip: use mirror images as well; the cache must hold them.
        batch_size, micro_batch_size, num_workers, seed, balance, allow_changed_source: see `ImageDataModule`.
    """

    batch_maker = _MomentMaker

    def __init__(
        self,
        path: str,
        image_size: Size = 32,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        pixels: Size | None = None,
        resize: str | None = None,
        flip: bool = True,
        num_workers: int | None = None,
        seed: int = 0,
        balance: bool = False,
        allow_changed_source: bool = False,
        buckets: list[Size] | None = None,
    ):
        super().__init__(
            image_size,
            batch_size,
            micro_batch_size,
            num_workers,
            seed,
            flip,
            balance,
            buckets,
            cache=False,
            allow_changed_source=allow_changed_source,
        )
        self.path, self.pixels, self.resize = path, pixels, resize

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        folder = Path(self.path).expanduser() / part
        if part == "validation" and not (folder / CACHE_METADATA).is_file():
            return None
        caches = sorted(p.parent for p in folder.glob(f"*/{CACHE_METADATA}")) if part == "train" else []
        if not caches and not (self.buckets and part == "train"):
            source = LatentSource(folder)
            self._check(source, self.image_size)
            return source
        parts = {as_size(list(s.shape[1:])): s for s in map(LatentSource, caches)}
        if parts.keys() != {*self.buckets}:
            raise UserError(
                f"the latents in {self.path!r} are in the buckets [{_listed(parts)}], but the recipe expects "
                f"[{_listed(self.buckets)}], in latent pixels: set data.init_args.buckets, or encode the others as well"
            )
        for size, source in parts.items():
            self._check(source, size)
        return LatentBuckets([parts[size] for size in self.buckets], self.path)

    def bucket_of(self, source: Source) -> Indices:
        return np.repeat(np.arange(len(self.buckets)), source.block_sizes)

    def _check(self, source: LatentSource, size: Size) -> None:
        cache_metadata, where = source.cache_metadata, f"the latents in {self.path!r}"
        found, expected = as_size(list(source.shape[1:])), size_text(size)
        if found != size:
            raise UserError(
                f"{where} are of {size_text(found)} px (images of {size_text(cache_metadata.image_size)} px), but the "
                f"recipe expects {expected}: set data.init_args.image_size, or encode at another size"
            )
        if self.pixels is not None and not self.buckets and cache_metadata.image_size != as_size(self.pixels, "pixels"):
            made = size_text(cache_metadata.image_size)
            raise UserError(f"{where} were made from images of {made} px, not {size_text(as_size(self.pixels))}")
        if self.resize is not None and cache_metadata.resize != self.resize:
            raise UserError(f"{where} were made with the resize {cache_metadata.resize!r}, not {self.resize!r}")
        if self.transform.flip and cache_metadata.flips < 2:
            raise UserError(f"{where} hold no mirror images: set flip to false, or encode with both flips")

    def setup(self, stage: str | None = None) -> None:
        """Refuse a cache that another autoencoder made than the model's."""
        autoencoder = getattr(getattr(self.trainer, "lightning_module", None), "autoencoder", None)
        if autoencoder is None:
            return
        for cache_metadata in cast(LatentSource | LatentBuckets, self.train_source).made_from:
            if autoencoder.hash != cache_metadata.autoencoder_hash:
                raise UserError(
                    f"the latents in {self.path!r} were made by {cache_metadata.autoencoder} "
                    f"({cache_metadata.autoencoder_hash[:12]}), but the recipe's autoencoder is {autoencoder.id} "
                    f"({autoencoder.hash[:12]}): encode again, or name the same autoencoder"
                )
