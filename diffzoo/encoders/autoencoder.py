"""Frozen autoencoders: images to unit-variance latents and back.

A latent model sees latents of about unit variance: the autoencoder's own, times a scaling factor that was estimated
when it was trained (0.18215 for Stable Diffusion's on ImageNet, 0.2301 on MS-COCO), or normalised channel by channel:

    latents = scaling_factor (own - mean) / std

These numbers belong to a pair of autoencoder and data, so they are stated here and nowhere else.

`encode` returns moments, the mean and standard deviation, and does not sample: all randomness belongs to the training
step (`diffzoo.rng`). `id` and `hash` go into the metadata of a latent cache.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.encoders.ldm import from_ldm, latent_statistics
from diffzoo.errors import MissingExtraError, UserError
from diffzoo.formats import read_any
from diffzoo.hub import hub_file
from diffzoo.pins import check_files, first_revision
from diffzoo.tensors import AUTOENCODER, state_sha256
from diffzoo.typing import Images, Latents

__all__ = ["Autoencoder", "AutoencoderSpec", "Identity", "KLAutoencoder", "LDMAutoencoder", "RepresentationAutoencoder"]

PixelRange = Literal["[-1, 1]", "[0, 1]"]


@runtime_checkable
class Autoencoder(Protocol):
    """What a latent model needs of its autoencoder.

    id:      where it comes from, with revision and scaling factor.
    hash:    of its weights and scaling factor, 64 hexadecimal digits.
    ratio:   pixels per latent pixel, in each direction.
    channels: of the latents.
    """

    @property
    def id(self) -> str: ...

    @property
    def hash(self) -> str: ...

    @property
    def ratio(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def encode(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the latents of images in [-1, 1], scaled to unit variance."""

    def decode(self, latents: Latents) -> Images:
        """Images, about in [-1, 1], from unit-variance latents."""

    def to(self, device: torch.device | str) -> Self:
        """The same autoencoder on another device."""


class Identity:
    """Pixel space: latents are the images."""

    id = "identity"
    hash = hashlib.sha256(b"identity").hexdigest()
    ratio = 1
    channels = 3

    def encode(self, images: Images) -> tuple[Latents, Latents]:
        """The images, with no spread."""
        return images, torch.zeros_like(images)

    def decode(self, latents: Latents) -> Images:
        """The images again."""
        return latents

    def to(self, device: torch.device | str) -> Self:
        """Nothing to move."""
        return self


@dataclass(frozen=True)
class AutoencoderSpec:
    """Which autoencoder a latent model was trained with: what builds it again.

    Args:
        repo: Hub repository in diffusers' layout, or a folder.
        scaling_factor: what its latents are multiplied by to have unit variance.
        revision: 40-digit commit; None = recorded on first use.
        subfolder: folder inside the repository.
        mean, std: of its latents, one per channel, by which they are normalised before that; empty = they are not.
        pixels: range of the images that it takes and gives.
        kind: "kl" for `diffusers.AutoencoderKL`; "ldm" for the same in the layout of latent diffusion; "rae" for
            `diffusers.AutoencoderRAE`, which normalises by itself.
        file: of "ldm": which file of the repository holds the weights.
        statistics: of "ldm": which file holds mean and std of the latents; None = that of the weights.
    """

    repo: str
    scaling_factor: float
    revision: str | None = None
    subfolder: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pixels: PixelRange = "[-1, 1]"
    kind: Literal["kl", "ldm", "rae"] = "kl"
    file: str = ""
    statistics: str | None = None

    def build(self) -> "KLAutoencoder":
        """The autoencoder; nothing is loaded before its first use."""
        if self.kind == "ldm":
            return LDMAutoencoder(self.repo, self.file, self.statistics, self.revision)
        if self.kind == "rae":
            return RepresentationAutoencoder(self.repo, self.revision, self.subfolder)
        fixed = (self.scaling_factor, self.revision, self.subfolder)
        return KLAutoencoder(self.repo, *fixed, mean=self.mean, std=self.std, pixels=self.pixels)


class KLAutoencoder:
    """Stable Diffusion's autoencoder (arXiv:2112.10752) and its relatives, through `diffusers.AutoencoderKL`.

    Nothing is downloaded or imported before the first use.

    Args:
        repo: Hub repository in diffusers' layout, or a local folder.
        scaling_factor: what latents are multiplied by to have unit variance.
        revision: commit, tag or branch; None = what the Hub's main branch was when it was first downloaded here,
            which is recorded (`diffzoo.pins`), and which `id` names.
        subfolder: folder inside the repository, such as "vae".
        dtype: of weights and arithmetic, "float32", "float16" or "bfloat16"; results are float32.
        batch_size: images at a time; a decoder needs about 1 GB per image of 512 px in float32.
        mean, std: of its latents, one per channel, by which they are normalised before scaling; empty = they are not.
        pixels: range of the images that it takes and gives: EDM2 feeds Stable Diffusion's with [0, 1].

    Raises:
        MissingExtraError: on first use, when diffusers is not installed.
        UserError: on first use, when the weights cannot be had.
    """

    kind: ClassVar[str] = "AutoencoderKL"

    def __init__(
        self,
        repo: str = "stabilityai/sd-vae-ft-ema",
        scaling_factor: float = 0.18215,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        pixels: PixelRange = "[-1, 1]",
    ):
        if scaling_factor <= 0 or not all(v > 0 for v in std):
            raise UserError(f"the scaling factor and std must be positive, got {scaling_factor} and {list(std)}")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"expected dtype float32, float16 or bfloat16, got {dtype!r}")
        self.repo, self.scaling_factor, self.revision, self.subfolder = repo, scaling_factor, revision, subfolder
        self.mean, self.std, self.pixels = tuple(mean), tuple(std), pixels
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self.device: torch.device = torch.device("cpu")
        self._model: Any = None  # diffusers states no types
        self._hash: str | None = None

    # -- loading

    @property
    def model(self) -> Any:
        """The model of diffusers, loaded on first use."""
        if self._model is None:
            self._model = self._load().to(self.device, self.dtype).eval().requires_grad_(False)
        return self._model

    def _load(self) -> Any:
        diffusers = _diffusers()
        inside = f"{self.subfolder}/" if self.subfolder else ""
        files = [f"{inside}{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")]
        folder = self._files(*files)[-1].parent
        try:
            return getattr(diffusers, self.kind).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} does not hold an autoencoder in diffusers' layout: {reason}") from error

    def _files(self, first: str, *more: str) -> list[Path]:
        """Files of the folder or repository; the first one's download tells the revision."""
        local = Path(self.repo).expanduser()
        if local.is_dir():
            return [local / name for name in (first, *more)]
        if self.repo.count("/") != 1:
            raise UserError(f"there is no folder {self.repo}; a Hub repository is written owner/name")
        what = f"the autoencoder {self.repo}"
        revision = self.revision or first_revision(self.repo, first, what)
        found = {name: hub_file(self.repo, name, revision, what) for name in (first, *more)}
        if self.revision is None:
            check_files(self.repo, {name: path for name, (path, _) in found.items() if not name.endswith(".json")})
        self.revision = found[first][1]
        return [path for path, _ in found.values()]

    # -- what it is

    @property
    def spec(self) -> AutoencoderSpec:
        """What builds it again, for checkpoints; with the revision once that is known."""
        place = (self.repo, self.scaling_factor, self.revision, self.subfolder)
        return AutoencoderSpec(*place, mean=self.mean, std=self.std, pixels=self.pixels)

    @property
    def _normalised(self) -> str:
        """How its latents are normalised and in what range its images are, where that is not the usual way."""
        parts = (("mean", self.mean, ()), ("std", self.std, ()), ("pixels", self.pixels, "[-1, 1]"))
        return "".join(f" {name} {list(v) if name != 'pixels' else v}" for name, v, usual in parts if v != usual)

    @property
    def id(self) -> str:
        """Repository, revision, folder and scaling factor, and how latents are normalised where they are."""
        _ = self.model  # the revision is known once the files are
        place = "/".join(p for p in (self.repo, self.subfolder) if p)
        return f"{place}@{self.revision or 'local'} x{self.scaling_factor:g}{self._normalised}"

    @property
    def hash(self) -> str:
        """SHA-256 of the weights in float32, by name, of the scaling factor, and of the normalisation."""
        if self._hash is None:
            state = self._load().state_dict()  # mean and std may be known only then
            start = f"{float(self.scaling_factor)!r}{self._normalised}".encode()
            self._hash = state_sha256(state, AUTOENCODER, start=start)
        return self._hash

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel: 8 for Stable Diffusion's."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of the latents: 4 for Stable Diffusion's."""
        return int(self.model.config.latent_channels)

    # -- use

    def to(self, device: torch.device | str) -> Self:
        """Move it, or remember where to load it."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images: Images) -> tuple[Latents, Latents]:
        """Moments of the latents: mean and standard deviation, `(b, channels, h / ratio, w / ratio)`, float32.

        Args:
            images: `(b, 3, h, w)` in [-1, 1]; h and w are multiples of `ratio`.
        """
        h, w = images.shape[-2:]
        if images.shape[1] != 3 or h % self.ratio or w % self.ratio:
            raise UserError(
                f"expected images (b, 3, h, w) with h and w multiples of {self.ratio}, got {tuple(images.shape)}"
            )
        own = images if self.pixels == "[-1, 1]" else (images + 1) / 2
        parts = [self._moments(part.to(self.device, self.dtype)) for part in own.split(self.batch_size)]
        mean, std = (torch.cat(part).float() for part in zip(*parts, strict=True))
        scale, shift = self._affine(mean)
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Images `(b, 3, ratio h, ratio w)`, float32, about in [-1, 1].

        Args:
            latents: unit-variance latents `(b, channels, h, w)`.
        """
        if latents.shape[1] != self.channels:
            raise UserError(f"expected latents of {self.channels} channels, got shape {tuple(latents.shape)}")
        scale, shift = self._affine(latents)
        parts = (latents / scale + shift).split(self.batch_size)
        own = torch.cat([self.model.decode(part.to(self.device, self.dtype)).sample.float() for part in parts])
        return own if self.pixels == "[-1, 1]" else 2 * own - 1

    def _moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the model's own latents."""
        latents = self.model.encode(images).latent_dist
        return latents.mean, latents.std

    def _affine(self, like: Latents) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """What latents are multiplied by, after the other was subtracted."""
        ones = (1.0,) * self.channels
        if len(self.std or ones) != self.channels or len(self.mean or ones) != self.channels:
            raise UserError(f"the autoencoder has {self.channels} channels: give mean and std of each of them")
        std, mean = (like.new_tensor(v)[:, None, None] for v in (self.std or ones, self.mean or (0.0,) * self.channels))
        return self.scaling_factor / std, mean

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.repo)!r}, scaling_factor={self.scaling_factor:g})"


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "latent", "the autoencoder of a latent model") from error
    return diffusers


class LDMAutoencoder(KLAutoencoder):
    """A KL autoencoder in the layout of latent diffusion, normalised per channel: VA-VAE's and REPA-E's.

    Args:
        repo: Hub repository, or a local folder.
        file: of the weights; a training checkpoint of REPA-E holds them under "vae".
        statistics: file of mean and std of the latents; None = they lie in that of the weights.
        revision, dtype, batch_size: as in `KLAutoencoder`.
    """

    def __init__(
        self,
        repo: str,
        file: str,
        statistics: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ):
        super().__init__(repo, 1.0, revision, dtype=dtype, batch_size=batch_size)
        self.file, self.statistics = file, statistics

    @property
    def id(self) -> str:
        """Repository, file, revision, and the file of statistics, whose numbers are part of `hash`."""
        _ = self.model
        place = f"{self.repo}/{self.file}@{self.revision or 'local'}"
        return f"{place}, normalised by {self.statistics}" if self.statistics else place

    def _load(self) -> Any:
        _diffusers()
        weights, *statistics = self._files(self.file, *([self.statistics] if self.statistics else []))
        data = read_any(weights)
        self.mean, self.std = latent_statistics(read_any(statistics[0]) if statistics else data, self.repo)
        return from_ldm(data, str(weights))

    @property
    def spec(self) -> AutoencoderSpec:
        """What builds it again."""
        return AutoencoderSpec(self.repo, 1.0, self.revision, kind="ldm", file=self.file, statistics=self.statistics)


class RepresentationAutoencoder(KLAutoencoder):
    """RAE (arXiv:2510.11690): the tokens of a frozen vision encoder, decoded by a transformer, through diffusers.

    Its latents have no spread, and the model itself normalises them by statistics that are part of its weights.

    Args:
        repo: Hub repository in diffusers' layout, or a local folder.
        revision, subfolder, dtype, batch_size: as in `KLAutoencoder`.
    """

    kind: ClassVar[str] = "AutoencoderRAE"

    def __init__(
        self,
        repo: str = "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ):
        super().__init__(repo, 1.0, revision, subfolder, dtype, batch_size, pixels="[0, 1]")

    @property
    def spec(self) -> AutoencoderSpec:
        """What builds it again."""
        return AutoencoderSpec(self.repo, 1.0, self.revision, self.subfolder, kind="rae")

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel: 16 for DINOv2 at 224 pixels, decoded at 256."""
        return int(self.model.decoder_patch_size)

    @property
    def channels(self) -> int:
        """Channels of the latents: the width of the encoder, 768 for the base size."""
        return int(self.model.config.encoder_hidden_size)

    def _moments(self, images: Images) -> tuple[Latents, Latents]:
        latents = self.model.encode(images).latent
        return latents, torch.zeros_like(latents)
