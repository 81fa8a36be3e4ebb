"""ADM: the pixel-space U-Nets of "Diffusion Models Beat GANs on Image Synthesis", whose weights exist.

Papers: ADM, arXiv:2105.05233; the learned variance and the cosine table, arXiv:2102.09672; classifier guidance,
Section 4 of the former. Reference: openai/guided-diffusion (MIT). The code here is written anew; parameter names are
our own, and `diffzoo.zoo.converters.guided_diffusion` maps the released files onto them, tensor by tensor.

Improved DDPM (arXiv:2102.09672, openai/improved-diffusion), EDM's ImageNet-64 model (arXiv:2206.00364) and consistency
models with their teachers (arXiv:2303.01469, openai/consistency_models) have the same network with other options; they
are the variants `iddpm_*` and `edm_*`. What their outputs mean and what they read is a fact of each set of weights.

Notable features
- BigGAN residual blocks: the embedding scales and shifts the second norm; up- and downsampling happen inside a block.
- Attention at several resolutions, with two layouts of the qkv channels. Shapes do not tell them apart, so the layout
  is a fact of the config: only the released 64 px model and the EDM family use "new".
- The network reads the index 0..999 of the noise step as a plain number; any real number is legal, and the EDM family
  reads 250 ln(sigma) or ln(sigma) / 4.
- Twice the output channels with learned variance: noise, then the interpolation between two bounds of log variance.
- Classes are added to the time embedding. Released models have no null class, so they cannot do classifier-free
  guidance; a noise-aware classifier (`ADMClassifier`) guides them instead.
- Upsamplers see a clean low-resolution image, enlarged bilinearly and joined to the input (`Condition.low_res`).

Different from the reference: attention is a fused kernel, checkpointing is off unless asked for, mixed precision is
autocast's business (GroupNorm stays in float32), and dropout is placed per resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import UserError, check_choice
from diffzoo.models.base import Level, LevelConfig, Network
from diffzoo.models.registry import register_variants
from diffzoo.nn.attention import attend, split_heads, to_image, to_tokens
from diffzoo.nn.embeddings import cosine_sine
from diffzoo.nn.norms import STANDARD, check_norm, map_norm, zeroed
from diffzoo.nn.time_dependent import scaled_level
from diffzoo.typing import Condition, Images, Maps, NoiseLevel, Output, Tokens, Vectors

__all__ = [
    "CLASSIFIERS",
    "DEFAULT_MULTIPLIERS",
    "TINY",
    "TINY_CLASSIFIER",
    "VARIANTS",
    "ADMClassifier",
    "ADMClassifierConfig",
    "ADMConfig",
    "ADMEncoderConfig",
    "ADMUNet",
]

AttentionOrder = Literal["legacy", "new"]
GROUPS = 32
INDICES = (0, 999)  # the first and the last noise step


# -- configs


@dataclass(frozen=True)
class ADMEncoderConfig(LevelConfig):
    """Fields that the U-Net and the classifier share. Level i has 1 / 2^i of the height and width of the image.

    Args:
        base_width: frequencies of the time embedding, which is four times as wide; not tied to the levels' widths.
        scale_shift_norm: the embedding scales and shifts the second norm; else it is added before it.
        residual_resampling: resample inside a residual block; else between blocks.
        conv_resampling: resampling between blocks has a 3x3 convolution; else it has no parameters.
        head_channels: channels of an attention head; None: `Level.heads` says how many heads.
        attention_order: layout of the qkv channels, "legacy" (head, qkv, channel) or "new" (qkv, head, channel).
            Both load without complaint from either file; the wrong one gives nonsense.
        norm: of the blocks and attentions: "standard" (group norm), "td_ln", "td_rmsn" or "rmsn", over the channels of
            each position. Time-dependent norms read the noise level with index 0 at -1 and 999 at 1. The norm before
            the output stays as it is.
    """

    null_class: bool = False
    base_width: int = 256
    scale_shift_norm: bool = True
    residual_resampling: bool = True
    conv_resampling: bool = True
    head_channels: int | None = 64
    attention_order: AttentionOrder = "legacy"
    norm: str = STANDARD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm(self.norm, first_token=False)
        check_choice("attention_order", self.attention_order, AttentionOrder)
        self.check_levels()
        for level in self.levels:
            self._check_level(level)

    def _check_level(self, level: Level) -> None:
        if level.depth < 1:
            raise UserError(f"depth must be at least 1 at every level, got {level.depth} at {level.resolution} px")
        if level.width % GROUPS:
            raise UserError(f"widths must be multiples of {GROUPS}, got {level.width} at {level.resolution} px")
        heads = self.heads(level)
        if heads < 1 or level.width % heads or (self.head_channels and level.width % self.head_channels):
            wanted = f"heads of {self.head_channels} channels" if self.head_channels else f"{heads} heads"
            raise UserError(f"{level.width} channels at {level.resolution} px do not divide into {wanted}")

    def heads(self, level: Level) -> int:
        """Attention heads of a level."""
        return level.width // self.head_channels if self.head_channels else level.heads


@dataclass(frozen=True)
class ADMConfig(ADMEncoderConfig):
    """A U-Net.

    Args:
        learned_variance: twice the output channels.
        upsampler: reads `Condition.low_res` besides the noisy image.
        heads_up: attention heads on the way up, where they differ from `Level.heads`; only without `head_channels`.
    """

    learned_variance: bool = True
    upsampler: bool = False
    heads_up: int | None = None


@dataclass(frozen=True)
class ADMClassifierConfig(ADMEncoderConfig):
    """A noise-aware classifier: the U-Net's way down and attention pooling. `num_classes` is what it tells apart."""

    num_classes: int = 1000
    base_width: int = 128


# -- blocks


class GroupNorm(nn.GroupNorm):
    """32 groups, computed in float32 whatever the input's type; `tau` is ignored."""

    def __init__(self, width: int):
        super().__init__(GROUPS, width, eps=1e-5)

    def forward(self, x: Maps, tau: NoiseLevel | None = None) -> Maps:
        return F.group_norm(x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def _resize(x: Tensor, direction: Literal["down", "up"] | None) -> Tensor:
    if direction == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else x


class TimeEmbedding(nn.Module):
    """A number to a vector: cosines, then sines, of `n exp(-i ln(10000) / half)`, i < half, and two linear layers."""

    def __init__(self, frequencies: int):
        super().__init__()
        self.frequencies = frequencies
        self.linear1 = nn.Linear(frequencies, 4 * frequencies)
        self.linear2 = nn.Linear(4 * frequencies, 4 * frequencies)

    def forward(self, noise_level: NoiseLevel) -> Vectors:
        waves = cosine_sine(noise_level, self.frequencies)
        return self.linear2(F.silu(self.linear1(waves.to(self.linear1.weight.dtype))))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the embedding in between; optionally resamples after the first SiLU."""

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        dropout: float,
        scale_shift: bool,
        resample: Literal["down", "up"] | None = None,
        norm: str = STANDARD,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = map_norm(norm, width_in, GroupNorm)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * width if scale_shift else width)
        self.norm2 = map_norm(norm, width, GroupNorm)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Maps, embedding: Vectors, tau: NoiseLevel | None = None) -> Float[Tensor, "b c2 h2 w2"]:
        h = self.conv1(_resize(F.silu(self.norm1(x, tau)), self.resample))
        e = self.embedding(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h, tau) * (1 + scale) + shift
        else:
            h = self.norm2(h + e, tau)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(_resize(x, self.resample)) + h


def _split_heads(qkv: Tokens, heads: int, order: AttentionOrder) -> tuple[Tensor, ...]:
    """`(b, n, 3 c)` to q, k, v of shape `(b, heads, n, d)`."""
    if order == "new":
        return split_heads(qkv, 3, heads)
    return qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)


class Attention(nn.Module):
    """Self-attention over all positions, with a residual."""

    def __init__(self, width: int, heads: int, order: AttentionOrder, norm: str = STANDARD):
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = map_norm(norm, width, GroupNorm)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Maps, tau: NoiseLevel | None = None) -> Maps:
        qkv = self.qkv(to_tokens(self.norm(x, tau)))
        h = self.out(attend(*_split_heads(qkv, self.heads, self.order)))
        return x + to_image(h, x.shape[2])


class Resample(nn.Module):
    """Resampling between blocks: a strided convolution or pooling down; nearest neighbours, then a convolution, up."""

    def __init__(self, width: int, direction: Literal["down", "up"], conv: bool):
        super().__init__()
        self.direction = direction
        stride = 2 if direction == "down" else 1
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1) if conv else None

    def forward(self, x: Maps) -> Float[Tensor, "b c h2 w2"]:
        if self.conv is None:
            return _resize(x, self.direction)
        return self.conv(x if self.direction == "down" else _resize(x, "up"))


class Stage(nn.Module):
    """One level on one side of the U: residual blocks, attention after each or none, and resampling at the end."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.resample = resample


def _stages(side: nn.ModuleList) -> list[Stage]:
    return [stage for stage in side if isinstance(stage, Stage)]


class Middle(nn.Module):
    """The bottom of the U, where there is always attention."""

    def __init__(self, block1: nn.Module, attention: nn.Module, block2: nn.Module):
        super().__init__()
        self.block1, self.attention, self.block2 = block1, attention, block2


class AttentionPool(nn.Module):
    """One more query, the mean of all positions, attends to everything; its output is the result."""

    def __init__(self, width: int, positions: int, heads: int, outputs: int):
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(positions + 1, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Maps) -> Float[Tensor, "b k"]:
        tokens = to_tokens(x)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position.to(x.dtype)
        # the pool splits heads the new way in every released classifier, whatever the body does
        q, k, v = split_heads(self.qkv(tokens), 3, self.heads)
        return self.out(attend(q[:, :, :1], k, v)[:, 0])


# -- networks


class _Encoder(Network):
    """The way down and the middle, which the U-Net and the classifier share."""

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (ResidualBlock, Attention)
    config: ADMEncoderConfig

    def __init__(self, config: ADMEncoderConfig, channels: int):
        super().__init__(config)
        levels = config.levels
        self.time = TimeEmbedding(config.base_width)
        self.conv_in = nn.Conv2d(channels, levels[0].width, 3, padding=1)
        self.down = nn.ModuleList()
        width, self.skip_widths = levels[0].width, [levels[0].width]
        for level, coarser in zip(levels, [*levels[1:], None], strict=True):
            blocks = [self._block(width if i == 0 else level.width, level) for i in range(level.depth)]
            width = level.width
            attentions = [self._attention(level) for _ in blocks] if level.attention else []
            resample = self._resample(width, coarser, "down") if coarser else None
            self.down.append(Stage(blocks, attentions, resample))
            self.skip_widths += [level.width] * level.depth + ([width] if coarser else [])
        last = levels[-1]
        self.middle = Middle(self._block(width, last), self._attention(last), self._block(width, last))

    def _block(self, width_in: int, level: Level, resample: Literal["down", "up"] | None = None) -> ResidualBlock:
        c = self.config
        embedding = 4 * c.base_width
        return ResidualBlock(width_in, level.width, embedding, level.dropout, c.scale_shift_norm, resample, c.norm)

    def _attention(self, level: Level) -> Attention:
        return Attention(level.width, self.config.heads(level), self.config.attention_order, self.config.norm)

    def _resample(self, width: int, towards: Level, direction: Literal["down", "up"]) -> nn.Module:
        # a resampling block works, and drops out, at the resolution it arrives at
        if self.config.residual_resampling:
            return self._block(width, replace(towards, width=width), direction)
        return Resample(width, direction, self.config.conv_resampling)

    def _apply_block(self, stage: Stage, index: int, h: Tensor, embedding: Tensor, tau: Tensor) -> Tensor:
        h = self.run(stage.blocks[index], h, embedding, tau)
        return self.run(stage.attentions[index], h, tau) if len(stage.attentions) else h

    def _apply_resample(self, stage: Stage, h: Tensor, embedding: Tensor, tau: Tensor) -> Tensor:
        if isinstance(stage.resample, ResidualBlock):
            return self.run(stage.resample, h, embedding, tau)
        return stage.resample(h) if stage.resample is not None else h

    def _encode(self, x: Tensor, embedding: Tensor, tau: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle's output and everything that goes across the U, in order."""
        h = self.conv_in(x)
        skips = [h]
        for stage in _stages(self.down):
            for i in range(len(stage.blocks)):
                h = self._apply_block(stage, i, h, embedding, tau)
                skips.append(h)
            if stage.resample is not None:
                h = self._apply_resample(stage, h, embedding, tau)
                skips.append(h)
        h = self.run(self.middle.block1, h, embedding, tau)
        h = self.run(self.middle.attention, h, tau)
        return self.run(self.middle.block2, h, embedding, tau), skips


def _with_low_res(z: Tensor, cond: Condition | None, upsampler: bool) -> Tensor:
    """The noisy images, for an upsampler with the small ones enlarged beside them, `(b, 2c, h, w)`."""
    low = cond.low_res if cond is not None else None
    if not upsampler:
        if low is not None:
            raise UserError("this network is no upsampler: it was given low-resolution images; leave them out")
        return z
    if low is None:
        raise UserError("this network is an upsampler: give it clean low-resolution images (Condition.low_res)")
    if low.ndim != 4 or low.shape[:2] != z.shape[:2]:
        raise UserError(f"expected low-resolution images ({len(z)}, {z.shape[1]}, h, w), got {tuple(low.shape)}")
    low = F.interpolate(low.to(z.dtype), z.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([z, low], dim=1)


class ADMUNet(_Encoder):
    """The U-Net of ADM, or its upsampler.

    Reads the index of the noise step (0..999 in all released models). With learned variance the output has
    `2 in_channels` channels: the prediction, then the variance value in about [-1, 1].
    """

    any_size = True
    config: ADMConfig

    def __init__(self, config: ADMConfig):
        super().__init__(config, config.in_channels * (2 if config.upsampler else 1))
        if config.num_classes:
            self.classes = nn.Embedding(config.class_rows, 4 * config.base_width)
        width, skips = config.levels[-1].width, list(self.skip_widths)
        stages: list[Stage] = []
        for level, finer in reversed(list(zip(config.levels, [None, *config.levels[:-1]], strict=True))):
            blocks = []
            for _ in range(level.depth + 1):
                blocks.append(self._block(width + skips.pop(), level))
                width = level.width
            up = level if config.heads_up is None else replace(level, heads=config.heads_up)
            attentions = [self._attention(up) for _ in blocks] if level.attention else []
            stages.append(Stage(blocks, attentions, self._resample(width, finer, "up") if finer else None))
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = GroupNorm(width)
        outputs = config.in_channels * (2 if config.learned_variance else 1)
        self.conv_out = zeroed(nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Output:
        """`(b, c, h, w)`, or `(b, 2c, h, w)` with learned variance.

        Args:
            z: noisy images `(b, c, h, w)`.
            noise_level: index of the noise step, `(b,)`.
            cond: `label` if the network has classes, `low_res` if it is an upsampler.

        Raises:
            UserError: for a shape that does not fit, and for classes or low-resolution images that are missing or
                have no place in this network.
        """
        self.check_input(z)
        label = self.labels(z, cond)
        embedding, tau = self.time(noise_level), scaled_level(noise_level, *INDICES)
        if label is not None:
            embedding = embedding + self.classes(label)
        h, skips = self._encode(_with_low_res(z, cond, self.config.upsampler), embedding, tau)
        for stage in reversed(_stages(self.up)):
            for i in range(len(stage.blocks)):
                h = self._apply_block(stage, i, torch.cat([h, skips.pop()], dim=1), embedding, tau)
            h = self._apply_resample(stage, h, embedding, tau)
        return self.conv_out(F.silu(self.norm_out(h)))


class ADMClassifier(_Encoder):
    """The noise-aware classifier of classifier guidance: noisy images and a noise level to class logits.

    Not a denoiser: the output is `(b, num_classes)`.
    """

    config: ADMClassifierConfig

    def __init__(self, config: ADMClassifierConfig):
        super().__init__(config, config.in_channels)
        last = config.levels[-1]
        self.norm_out = GroupNorm(last.width)
        self.pool = AttentionPool(last.width, math.prod(config.grid(last)), config.heads(last), config.num_classes)

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Float[Tensor, "b k"]:
        """Logits `(b, num_classes)`.

        Args:
            z: noisy images `(b, c, h, w)`.
            noise_level: index of the noise step, `(b,)`.
            cond: unused; here so that all networks are called alike.
        """
        self.check_input(z)
        h, _ = self._encode(z, self.time(noise_level), scaled_level(noise_level, *INDICES))
        return self.pool(F.silu(self.norm_out(h)))


# -- sizes

DEFAULT_MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def adm_levels(
    image_size: int,
    base_width: int,
    depth: int,
    multipliers: Sequence[float] | None = None,
    attention: Sequence[int] = (32, 16, 8),
    heads: int = 4,
    dropout: float = 0.0,
) -> tuple[Level, ...]:
    """Levels as ADM states them: multiples of a base width, one depth, attention at some resolutions in pixels."""
    pixels = [image_size >> i for i in range(len(multipliers or DEFAULT_MULTIPLIERS[image_size]))]
    widths = [int(m * base_width) for m in multipliers or DEFAULT_MULTIPLIERS[image_size]]
    return tuple(Level(p, w, depth, p in attention, heads, dropout) for p, w in zip(pixels, widths, strict=True))


def _adm(
    image_size: int,
    width: int,
    depth: int,
    multipliers: Sequence[float] | None = None,
    attention: Sequence[int] = (32, 16, 8),
    heads: int = 4,
    dropout: float = 0.0,
    **options: Any,
) -> ADMConfig:
    levels = adm_levels(image_size, width, depth, multipliers, attention, heads, dropout)
    return ADMConfig(image_size=image_size, base_width=width, levels=levels, **options)


_CLASSES: dict[str, Any] = {"num_classes": 1000}
# improved DDPM: resampling by convolutions between blocks, attention counted in heads
_IDDPM: dict[str, Any] = {"residual_resampling": False, "head_channels": None}
_EDM: dict[str, Any] = {"attention_order": "new", "learned_variance": False, "dropout": 0.1}

VARIANTS: dict[str, ADMConfig] = {
    "adm_64": _adm(64, 192, 3, attention_order="new", dropout=0.1, **_CLASSES),
    "adm_128": _adm(128, 256, 2, head_channels=None, **_CLASSES),
    "adm_256": _adm(256, 256, 2, **_CLASSES),
    "adm_256_uncond": _adm(256, 256, 2),
    "adm_512": _adm(512, 256, 2, **_CLASSES),
    **{f"adm_lsun_{name}": _adm(256, 256, 2, dropout=0.1) for name in ("bedroom", "cat", "horse")},
    "adm_lsun_horse_nodropout": _adm(256, 256, 2),
    "adm_64_to_256": _adm(256, 192, 2, head_channels=None, upsampler=True, **_CLASSES),
    "adm_128_to_512": _adm(512, 192, 2, (1, 1, 2, 2, 4, 4), (32, 16), upsampler=True, **_CLASSES),
    "iddpm_32_uncond": _adm(32, 128, 3, attention=(16, 8), dropout=0.3, **_IDDPM),
    "iddpm_64_uncond": _adm(64, 128, 3, attention=(16, 8), **_IDDPM),
    "iddpm_64": _adm(64, 192, 3, attention=(16, 8), **_CLASSES, **_IDDPM),
    "iddpm_256_uncond": _adm(256, 128, 2, attention=(16,), heads=1, scale_shift_norm=False, **_IDDPM),
    "iddpm_64_to_256": _adm(256, 192, 2, attention=(16, 8), upsampler=True, **_CLASSES, **_IDDPM),
    "edm_64": _adm(64, 192, 3, **_CLASSES, **_EDM),
    "edm_256_uncond": _adm(256, 256, 2, scale_shift_norm=False, **_EDM),
}

CLASSIFIERS: dict[str, ADMClassifierConfig] = {
    f"adm_classifier_{size}": ADMClassifierConfig(
        image_size=size, levels=adm_levels(size, 128, 4 if size == 64 else 2, heads=1)
    )
    for size in (64, 128, 256, 512)
}

# for tests: both kinds of level, several heads, every feature of the released models
TINY = ADMConfig(
    image_size=16,
    num_classes=10,
    base_width=32,
    head_channels=16,
    levels=adm_levels(16, 32, 1, (1, 2), attention=(8,)),
)
TINY_CLASSIFIER = ADMClassifierConfig(
    image_size=16,
    num_classes=10,
    base_width=32,
    head_channels=16,
    levels=adm_levels(16, 32, 1, (1, 2), attention=(8,)),
)

register_variants(ADMUNet, VARIANTS)
register_variants(ADMClassifier, CLASSIFIERS, kind="classifier")
