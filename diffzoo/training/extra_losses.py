"""Terms of the training loss beside the denoising loss, as small objects that a recipe lists.

    CosineDirection      LightningDiT: the direction of the output                       arXiv:2501.01423, section 4
    Alignment            REPA: tokens of the network like those of a frozen encoder      arXiv:2410.06940, Eq. 8
    LearnedUncertainty   EDM2: errors weighed by an uncertainty that is learned          arXiv:2312.02696, Eq. 15

Each takes the loss per sample and gives it back with its term; they apply in the order of the list.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess, alignment_loss, direction_loss, uncertainty_loss
from diffzoo.typing import Data, Images, NoiseLevel, PerSample, Tokens

__all__ = [
    "Alignment",
    "CosineDirection",
    "ExtraLoss",
    "ImageEncoder",
    "LearnedUncertainty",
    "StepOutputs",
    "TimmEncoder",
]


@dataclass(frozen=True)
class StepOutputs:
    """What a training step has computed.

    Args:
        network, process: that are trained.
        x, eps: clean data and noise, `(b, c, h, w)`.
        t: times, `(b,)`; `level`, what the network read.
        output: at full resolution, float32.
        tokens: of the network's projector, where a term asks for them.
        images: clean images in [-1, 1] `(b, 3, h, w)`, where the data gives them.
    """

    network: Network
    process: GaussianProcess
    x: Data
    eps: Data
    t: PerSample
    level: NoiseLevel
    output: Data
    tokens: Tokens | None = None
    images: Images | None = None


class ExtraLoss(ABC):
    """A term of the loss."""

    needs_tokens: ClassVar[bool] = False
    """Whether the network gives tokens beside its output (`DiT.aligned`)."""

    def check(self, network: Network) -> None:  # noqa: B027  nothing to check is usual
        """Raise a `UserError` if this network cannot be trained with the term."""

    def to(self, device: torch.device) -> None:  # noqa: B027  nothing to bring is usual
        """Bring frozen parts to the device."""

    @abstractmethod
    def __call__(self, loss: PerSample, step: StepOutputs) -> PerSample:
        """The loss per sample with this term."""


@dataclass(frozen=True)
class CosineDirection(ExtraLoss):
    """Adds `weight` (1 - cosine similarity of output and target along the channels)."""

    weight: float = 1.0

    def __call__(self, loss: PerSample, step: StepOutputs) -> PerSample:
        return loss + self.weight * direction_loss(step.output, step.process.target(step.x, step.eps, step.t))


@dataclass(frozen=True)
class LearnedUncertainty(ExtraLoss):
    """Replaces the loss by loss / exp(u) + u, where the network learns u at each noise level.

    The loss is then that of times drawn by their density, each with its own weight: use `LogNormalSigma` with
    `EDMWeight`, not the weighting `EDM`, which is the product of both.
    """

    def check(self, network: Network) -> None:
        if not hasattr(network, "uncertainty"):
            raise UserError(
                f"extra_losses: LearnedUncertainty needs a network that learns its uncertainty, EDM2 with "
                f"network_args {{uncertainty: true}}; {type(network).__name__} does not"
            )

    def __call__(self, loss: PerSample, step: StepOutputs) -> PerSample:
        return uncertainty_loss(loss, step.network.log_variance(step.level).float())


# -- alignment


class ImageEncoder(ABC):
    """A frozen encoder of images."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of its tokens."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same encoder on another device."""

    @abstractmethod
    def __call__(self, images: Images) -> Tokens:
        """Tokens `(b, n, width)`, row by row, of images in [-1, 1]."""


class TimmEncoder(ImageEncoder):
    """A vision transformer of timm as a frozen encoder: the normalised tokens of its patches.

    Weights are fetched on first use.

    Args:
        name: in timm, such as "vit_base_patch14_dinov2.lvd142m".
        size: pixels that images are resized to; the tokens must be as many as the network's.
        pretrained: with its published weights.
    """

    def __init__(self, name: str = "vit_base_patch14_dinov2.lvd142m", size: int = 224, pretrained: bool = True):
        self.name, self.size, self.pretrained = name, size, pretrained
        self.device = torch.device("cpu")

    def _build(self, pretrained: bool) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(self.name, pretrained=pretrained, img_size=self.size, num_classes=0)
        return model.eval().requires_grad_(False)

    @cached_property
    def model(self) -> nn.Module:
        """The transformer."""
        return self._build(self.pretrained).to(self.device)

    @cached_property
    def width(self) -> int:
        with torch.device("meta"):
            return int(self._build(pretrained=False).num_features)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Self:
        self.device = device
        if "model" in self.__dict__:
            self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Images) -> Tokens:
        config = self.model.pretrained_cfg
        mean, std = (images.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))  # type: ignore[index]
        small = F.interpolate(images, (self.size, self.size), mode="bicubic", align_corners=False)
        tokens: Tensor = self.model.forward_features(((small + 1) / 2 - mean) / std)  # type: ignore[operator]
        return tokens[:, int(self.model.num_prefix_tokens) :].float()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Alignment(ExtraLoss):
    """Adds `weight` (- cosine similarity of the projected tokens and those of a frozen encoder of the clean image).

    Args:
        encoder: frozen, such as `TimmEncoder`.
        weight: of the term.
    """

    needs_tokens: ClassVar[bool] = True
    encoder: ImageEncoder
    weight: float = 0.5

    def check(self, network: Network) -> None:
        width = getattr(network.config, "projector_width", 0)
        if width != self.encoder.width:
            raise UserError(
                f"extra_losses: Alignment needs a projector to the {self.encoder.width} channels of its encoder, set "
                f"network_args {{projector_width: {self.encoder.width}}} of a DiT; this network has {width or 'none'}"
            )

    def to(self, device: torch.device) -> None:
        self.encoder.to(device)

    def __call__(self, loss: PerSample, step: StepOutputs) -> PerSample:
        if step.images is None or step.tokens is None:
            raise UserError(
                "extra_losses: Alignment compares with the clean images, and this data gives latents alone: train on "
                "images with an autoencoder, not on a cache of latents"
            )
        features = self.encoder(step.images)
        if features.shape != step.tokens.shape:
            raise UserError(
                f"extra_losses: the network has {step.tokens.shape[1]} tokens and the encoder {features.shape[1]}: "
                "choose another size of the encoder's images"
            )
        return loss + self.weight * alignment_loss(step.tokens.float(), features)
