"""Reference sets: the real images that generated ones are measured against.

A reference is an `.npz` file in ADM's layout, `mu` and `sigma` of the Inception pool features, `mu_s` and `sigma_s` of
the spatial ones, and images `arr_0` for the metrics of neighbours. Statistics and features of other networks lie beside
them as `<network>.<layer>.mu`, `.sigma` and `.features`.
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffzoo.cache import cache_dir
from diffzoo.errors import UserError, did_you_mean
from diffzoo.evaluation.image_files import FolderImages, NpzImages, array_header
from diffzoo.files import atomic_path, sha256
from diffzoo.metrics.features import FeatureNetwork, extract
from diffzoo.metrics.moments import Moments
from diffzoo.progress import progress_bar
from diffzoo.sizes import Size, pixels_text, size_text

__all__ = ["Reference", "find_reference", "make_reference", "reference_folder", "reference_of"]

_ADM_KEYS = {("inception-2015", "pool"): ("mu", "sigma"), ("inception-2015", "spatial"): ("mu_s", "sigma_s")}
ADM_FILES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
FDR_FILE = "paper_ref_stats"
PIECE = 500


def _keys(network: str, layer: str) -> tuple[str, str]:
    return _ADM_KEYS.get((network, layer), (f"{network}.{layer}.mu", f"{network}.{layer}.sigma"))


@dataclass
class Reference:
    """An open reference file.

    Args:
        path: the `.npz` file.
        sha256: hash of the file.
        id: what results call it, where that is not the protocol's own reference.
        remarks: what a reader of a result should know about it.
        size: of the images in pixels, where the file holds none of them.
    """

    path: Path
    sha256: str
    id: str | None = None
    remarks: Sequence[str] = ()
    size: Size | None = None
    _features: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Reference":
        """Open and hash a file; a `UserError` says what is wrong with it."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"the reference {path} does not exist")
        if path.suffix == ".pkl":
            return replace(cls.open(converted_pickle(path)), id=path.stem)
        reference = cls(path, "")
        if not reference.names & {"arr_0", "mu"} and not any(name.endswith(".mu") for name in reference.names):
            raise UserError(
                f"{path} is no reference: expected statistics (mu, sigma) or images (arr_0), "
                f"found {', '.join(sorted(reference.names)) or 'nothing'}"
            )
        reference.sha256 = sha256(path)
        return reference

    @property
    def names(self) -> set[str]:
        """The arrays in the file."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {n.removesuffix(".npy") for n in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.path} is damaged or no .npz file: fetch or make it again") from error

    def _array(self, name: str) -> Tensor:
        with np.load(self.path, allow_pickle=False) as archive:
            return torch.from_numpy(archive[name])

    def image_size(self) -> Size | None:
        """Size of the images in pixels; None if the file holds none."""
        return NpzImages(str(self.path)).image_size if "arr_0" in self.names else self.size

    def check_size(self, size: Size) -> None:
        """Raise if the reference's images are of another size than the evaluated ones."""
        own = self.image_size()
        if own is not None and own != size:
            raise UserError(
                f"reference mismatch: the images are {pixels_text(size)} pixels and those of {self.path.name} "
                f"{pixels_text(own)}: use the reference of that resolution"
            )

    def statistics(self, network: FeatureNetwork, layer: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of one layer: those in the file, else those of its images."""
        mu, sigma = _keys(network.name, layer)
        if {mu, sigma} <= self.names:
            mean, covariance = self._array(mu).double(), self._array(sigma).double()
            if mean.shape != (network.dims[layer],) or covariance.shape != (network.dims[layer],) * 2:
                raise UserError(
                    f"reference mismatch: {self.path.name} has statistics of {tuple(mean.shape)} dimensions and "
                    f"{network.name} gives {network.dims[layer]} at {layer!r}: they come from another network"
                )
            return mean, covariance
        moments = Moments.of(self.features(network, layer))
        return moments.mean, moments.covariance()

    def check_statistics(self, network: FeatureNetwork, layer: str) -> int | None:
        """Raise unless there are statistics of a layer, or images to take them of; returns the number of these images,
        None where the statistics lie in the file."""
        if set(_keys(network.name, layer)) <= self.names:
            self.statistics(network, layer)
            return None
        return self.check_features(network, layer)

    def check_features(self, network: FeatureNetwork, layer: str) -> int:
        """Raise unless there are features of a layer, or images to compute them of; returns their number."""
        stored = f"{network.name}.{layer}.features"
        if stored in self.names:
            n, d = self._shape(stored)
            if d != network.dims[layer]:
                raise UserError(
                    f"reference mismatch: {self.path.name} has features of {d} dimensions and {network.name} gives "
                    f"{network.dims[layer]} at {layer!r}: they come from another network"
                )
            return n
        if "arr_0" not in self.names:
            raise UserError(
                f"reference mismatch: {self.path.name} holds neither features of {network.name} nor images, "
                "so only metrics of its statistics can be computed: use a reference with images"
            )
        return len(NpzImages(str(self.path)))

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, without reading it."""
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            return array_header(member)[0]

    def features(self, network: FeatureNetwork, layer: str) -> Tensor:
        """Features of the reference images, `(m, d)`: those in the file, else computed (once) from its images."""
        key = (network.name, layer)
        stored = f"{network.name}.{layer}.features"
        if key not in self._features and stored in self.names:
            self._features[key] = self._array(stored)
        if key not in self._features:
            self.check_features(network, layer)
            for name, value in self._extracted(network).items():
                self._features.setdefault((network.name, name), value)
        return self._features[key]

    def _extracted(self, network: FeatureNetwork) -> dict[str, Tensor]:
        images = NpzImages(str(self.path))
        parts = [extract(network, images.images(i, PIECE)) for i in range(0, len(images), PIECE)]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def reference_folder() -> Path:
    """Where reference files lie: the environment variable DIFFZOO_REFERENCES, else `references` in diffzoo's cache."""
    given = os.environ.get("DIFFZOO_REFERENCES")
    return Path(given).expanduser() if given else cache_dir() / "references"


def find_reference(reference_id: str, path: str | os.PathLike[str] | None = None) -> Reference | FolderImages:
    """The file of a reference id: `path`, or `<id>.npz` in `reference_folder()`; or the images in the folder `path`.

    Raises:
        UserError: if it is not there; the message says where it belongs and how to get it.
    """
    if path is not None:
        if Path(path).is_dir():
            return FolderImages(str(path))
        opened = Reference.open(path)
        return replace(opened, id=opened.id or Path(path).stem)
    folder = reference_folder()
    file = folder / f"{reference_id}.npz"
    if not file.exists() and file.with_suffix(".pkl").exists():
        return Reference.open(file.with_suffix(".pkl"))
    if not file.exists():
        present = [p.stem for p in folder.glob("*.npz")] if folder.is_dir() else []
        size = re.fullmatch(r"VIRTUAL_imagenet(\d+)(?:_labeled)?", reference_id)
        published = f", published at {ADM_FILES}/{size[1]}/{reference_id}.npz" if size else ""
        if reference_id == FDR_FILE:
            file, published = file.with_suffix(".pkl"), ", published in the repository jjiaweiyang/FD-Loss of the Hub"
        raise UserError(
            f"the reference {reference_id!r} was not found: put its file at {file}{published}, name another with "
            f"--reference PATH, or make one with `diffzoo data stats`{did_you_mean(reference_id, present)}"
        )
    return Reference.open(file)


def reference_of(images: FolderImages, networks: Sequence[FeatureNetwork], progress: bool | None = None) -> Reference:
    """Statistics and features of all images in a folder, made once and kept in `reference_folder()` by content.

    Args:
        images: the real ones.
        networks: feature networks to take statistics of.
        progress: show a bar that counts images; None = in notebooks alone.
    """
    about = [images.sha256, *(f"{network.name} {network.rule} {network.weights_sha256()}" for network in networks)]
    size = size_text(images.image_size)
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    file = reference_folder() / "folders" / f"{size}px-{key}.npz"
    if not file.exists():
        with progress_bar(len(images), progress, unit=" images", desc="reference") as bar:
            make_reference(_counted(images, bar.update), networks, file, keep=len(images), pixels=False)
    made = Reference.open(file)
    name = f"{Path(images.path).name}-{images.sha256[:12]}"
    whose = f"the reference is made of the {len(images)} images of {size} px in {images.path}"
    return replace(made, id=name, size=images.image_size, remarks=[whose, *images.remarks()])


def _counted(images: FolderImages, done: Callable[[int], object]) -> Iterator[Tensor]:
    for start in range(0, len(images), 100):
        part = images.images(start, 100)
        yield part
        done(len(part))


def _pixels(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    pixels = batch if isinstance(batch, Tensor) else batch.get("image")
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4:
        got = "no key 'image'" if pixels is None else f"{pixels.dtype} {tuple(pixels.shape)}"
        raise UserError(f"reference statistics need batches of raw pixels, uint8 (b, 3, h, w); got {got}")
    return pixels


class _Gathered:
    """Statistics of all images, and the first `keep` of them with labels and features."""

    def __init__(self, networks: Sequence[FeatureNetwork], keep: int, pixels: bool):
        self.networks, self.keep, self.pixels = networks, keep, pixels
        self.count = 0
        self.moments: dict[tuple[str, str], Moments] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, pixels: Tensor, labels: Tensor | None) -> None:
        rest = max(0, self.keep - self.count)
        self.count += len(pixels)
        if self.pixels:
            self._keep("arr_0", pixels.permute(0, 2, 3, 1)[:rest])
        if self.pixels and labels is not None:
            self._keep("arr_1", labels[:rest])
        for network in self.networks:
            for layer, value in extract(network, pixels).items():
                if layer != "logits":
                    key = (network.name, layer)
                    new = Moments.of(value)
                    self.moments[key] = self.moments[key].merge(new) if key in self.moments else new
                    self._keep(f"{network.name}.{layer}.features", value[:rest])

    def _keep(self, name: str, value: Tensor) -> None:
        if len(value):
            self.kept.setdefault(name, []).append(value.cpu())

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for (network, layer), moments in self.moments.items():
            for key, value in zip(_keys(network, layer), (moments.mean, moments.covariance()), strict=True):
                yield key, value.numpy()
        for name, parts in self.kept.items():
            yield name, torch.cat(parts).numpy()


def make_reference(
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    networks: Sequence[FeatureNetwork],
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    keep: int = 10_000,
    pixels: bool = True,
) -> Reference:
    """Write the reference file of a stream of real images, and open it.

    Args:
        batches: raw pixels uint8 `(b, 3, h, w)`, or a data module's batches with `image` and perhaps `label`. They
            should come once each, unaugmented: a validation loader, or one pass over the training set without flips.
        networks: feature networks to take statistics of.
        path: the `.npz` file.
        limit: stop after this many images.
        keep: how many images (the first), and their features, are kept for the metrics of neighbours.
        pixels: keep the images themselves, not their features alone.

    Raises:
        UserError: for batches that hold no raw pixels, or fewer than two images.
    """
    gathered = _Gathered(networks, keep, pixels)
    for batch in batches:
        part = _pixels(batch)
        if limit is not None:
            part = part[: limit - gathered.count]
        if not len(part):
            break
        labels = None if isinstance(batch, Tensor) else batch.get("label")
        gathered.add(part, labels[: len(part)] if labels is not None else None)
    if gathered.count < 2:
        raise UserError(f"reference statistics need at least 2 images, got {gathered.count}")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, value in gathered.arrays():
            # a fixed date: equal images make an equal file, and so an equal hash
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value))
    return Reference.open(path)


# -- references of other projects

# name in the pickles of EDM2 and of arXiv:2604.28190: our feature network
_PICKLED = {
    "fid": "inception-2015",
    "fd_dinov2": "dinov2-vitl14",
    "guided_diffusion_stats.npz": "inception-2015",
    "convnext_in256_t224_stats.npz": "convnextv2-base-224",
    "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz": "dinov2-vitl14-256",
    "vit_large_patch16_224_mae_in256_t224_stats.npz": "mae-vitl16-224",
    "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz": "siglip2-so400m16-224",
    "vit_large_patch14_clip_224_openai_in256_t256_stats.npz": "clip-vitl14-256",
}
_PLAIN = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
    for name in ("_reconstruct", "scalar", "_frombuffer")
}


class _Plain(pickle.Unpickler):
    """Reads dictionaries, numbers and arrays, and runs nothing."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def converted_pickle(path: Path) -> Path:
    """Statistics in a pickle as `.npz`: `{"fid": {"mu", "sigma"}, ...}` as in EDM2 and FDr, or StyleGAN's sums.

    Raises:
        UserError: for a pickle that holds anything but dictionaries, numbers and arrays, or other statistics.
    """
    target = reference_folder() / "converted" / f"{path.stem}-{sha256(path)[:24]}.npz"
    if target.exists():
        return target
    try:
        with path.open("rb") as file:
            data = _Plain(file).load()
        if "raw_mean" in data:
            n, mean = int(data["num_items"]), np.asarray(data["raw_mean"], np.float64) / int(data["num_items"])
            statistics = {"mu": mean, "sigma": np.asarray(data["raw_cov"], np.float64) / n - np.outer(mean, mean)}
        else:
            known = [(_keys(network, "pool"), data[name]) for name, network in _PICKLED.items() if name in data]
            statistics = {
                key: np.asarray(part[what], np.float64)
                for keys, part in known
                for key, what in zip(keys, ("mu", "sigma"), strict=True)
            }
        if not statistics:
            raise KeyError(f"none of {', '.join(_PICKLED)}, raw_mean")
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no pickle of statistics that can be read without running it ({error}): load it where it was "
            "made and write np.savez(FILE, mu=..., sigma=...)"
        ) from error
    with atomic_path(target) as temporary, temporary.open("wb") as out:
        np.savez(out, **statistics)  # type: ignore[arg-type]
    return target
