"""Frozen autoencoders: images to unit-variance latents and back.

A latent model sees latents of about unit variance: the autoencoder's own, times a scaling factor that was estimated
when it was trained (0.18215 for Stable Diffusion's on ImageNet, 0.2301 on MS-COCO). The factor belongs to a pair of
autoencoder and data, so it is stated here and nowhere else.

`encode` returns moments, mean and standard deviation, and draws nothing: the randomness of a training step belongs to
the step (`diffzoo.rng`). `id` and `hash` go into the metadata of a latent cache.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.hub import hub_file
from diffzoo.pins import check_files, first_revision
from diffzoo.tensors import AUTOENCODER, state_sha256
from diffzoo.typing import Images, Latents

__all__ = ["Autoencoder", "AutoencoderSpec", "Identity", "KLAutoencoder"]


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
    """

    repo: str
    scaling_factor: float
    revision: str | None = None
    subfolder: str | None = None

    def build(self) -> "KLAutoencoder":
        """The autoencoder; nothing is loaded before its first use."""
        return KLAutoencoder(self.repo, self.scaling_factor, self.revision, self.subfolder)


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

    Raises:
        MissingExtraError: on first use, when diffusers is not installed.
        UserError: on first use, when the weights cannot be had.
    """

    def __init__(
        self,
        repo: str = "stabilityai/sd-vae-ft-ema",
        scaling_factor: float = 0.18215,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ):
        if scaling_factor <= 0:
            raise UserError(f"the scaling factor must be positive, got {scaling_factor}")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"expected dtype float32, float16 or bfloat16, got {dtype!r}")
        self.repo, self.scaling_factor, self.revision, self.subfolder = repo, scaling_factor, revision, subfolder
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.batch_size = batch_size
        self.device: torch.device = torch.device("cpu")
        self._model: Any = None  # diffusers states no types
        self._hash: str | None = None

    # -- loading

    @property
    def model(self) -> Any:
        """The `diffusers.AutoencoderKL`, loaded on first use."""
        if self._model is None:
            self._model = self._load().to(self.device, self.dtype).eval().requires_grad_(False)
        return self._model

    def _load(self) -> Any:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise MissingExtraError("diffusers", "latent", "the autoencoder of a latent model") from error
        folder = self._folder()
        try:
            return AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} does not hold an autoencoder in diffusers' layout: {reason}") from error

    def _folder(self) -> Path:
        inside = f"{self.subfolder}/" if self.subfolder else ""
        local = Path(self.repo).expanduser()
        if local.is_dir():
            return local / inside
        if self.repo.count("/") != 1:
            raise UserError(f"there is no folder {self.repo}; a Hub repository is written owner/name")
        what = f"the autoencoder {self.repo}"
        config, weights = f"{inside}config.json", f"{inside}diffusion_pytorch_model.safetensors"
        revision = self.revision or first_revision(self.repo, config, what)
        hub_file(self.repo, config, revision, what)
        path, commit = hub_file(self.repo, weights, revision, what)
        if self.revision is None:
            check_files(self.repo, {weights: path})
        self.revision = commit
        return path.parent

    # -- what it is

    @property
    def spec(self) -> AutoencoderSpec:
        """What builds it again, for checkpoints; with the revision once that is known."""
        return AutoencoderSpec(self.repo, self.scaling_factor, self.revision, self.subfolder)

    @property
    def id(self) -> str:
        """Repository, revision, folder and scaling factor."""
        _ = self.model  # the revision is known once the files are
        place = "/".join(p for p in (self.repo, self.subfolder) if p)
        return f"{place}@{self.revision or 'local'} x{self.scaling_factor:g}"

    @property
    def hash(self) -> str:
        """SHA-256 of the weights in float32, by name, and of the scaling factor."""
        if self._hash is None:
            factor = repr(float(self.scaling_factor)).encode()
            self._hash = state_sha256(self._load().state_dict(), AUTOENCODER, start=factor)
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
        parts = [self.model.encode(p.to(self.device, self.dtype)).latent_dist for p in images.split(self.batch_size)]
        mean = torch.cat([p.mean.float() for p in parts]) * self.scaling_factor
        std = torch.cat([p.std.float() for p in parts]) * self.scaling_factor
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Images `(b, 3, ratio h, ratio w)`, float32, about in [-1, 1].

        Args:
            latents: unit-variance latents `(b, channels, h, w)`.
        """
        if latents.shape[1] != self.channels:
            raise UserError(f"expected latents of {self.channels} channels, got shape {tuple(latents.shape)}")
        unscaled = latents / self.scaling_factor
        parts = [self.model.decode(p.to(self.device, self.dtype)).sample for p in unscaled.split(self.batch_size)]
        return torch.cat([p.float() for p in parts])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.repo)!r}, scaling_factor={self.scaling_factor:g})"
