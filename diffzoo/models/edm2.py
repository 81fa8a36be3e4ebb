"""EDM2: the magnitude-preserving U-Net of "Analyzing and Improving the Training Dynamics of Diffusion Models".

Paper: arXiv:2312.02696 (its config G); autoguidance, arXiv:2406.02507. Written from the papers; it loads the official
weights (`diffzoo.zoo.converters.edm2`) and reproduces the official outputs; parameter names are ours.

Notable features
- No bias, no group norm, no learned scale: every layer preserves magnitudes (`diffzoo.nn.magnitude`), and the weights
  are kept on a sphere during training. **A forward pass in training mode writes to the weights.**
- Encoder blocks normalise their input per pixel, decoder blocks concatenate a skip; both add their branch with a
  weight of 0.3.
- Attention is cosine attention: queries, keys and values have unit length.
- A channel of ones joins the input, in place of biases.
- Two gains per network start at zero, so that the first output is zero.
- No class is a row of zeros, not a learned one; it is legal, but the published conditional models never saw it. They
  are guided by a weaker network.
- `log_variance` is the learned uncertainty of the loss, Eq. 15; sampling does not need it.

It reads ln(sigma) / 4, and its output is EDM's: see `diffzoo.process.gaussian`, data scale 0.5 and sign -1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.base import Level, LevelConfig, Network
from diffzoo.models.registry import register_variants
from diffzoo.nn.attention import to_image, to_tokens
from diffzoo.nn.magnitude import Fourier, MPConv2d, MPLinear, MPTable, join, mix, normalize, silu
from diffzoo.typing import Condition, Images, Maps, NoiseLevel, Vectors

__all__ = ["TINY", "VARIANTS", "EDM2Config", "EDM2UNet", "edm2_levels"]

UNCERTAINTY_FEATURES = 128


# -- config


@dataclass(frozen=True)
class EDM2Config(LevelConfig):
    """The facts of an EDM2 network. The first level has the pixels of the image, each other one half of the one before.

    Args:
        head_channels: channels of an attention head.
        label_balance, concat_balance, residual_balance, attention_balance: shares of the class, the skips, the residual
            branch and attention in what they are mixed with.
        clip: activations are cut to [-clip, clip].
        uncertainty: whether the network has the layer behind `log_variance`, which a plain loss does not train.
    """

    head_channels: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float = 256.0
    uncertainty: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_levels()
        for i, level in enumerate(self.levels):
            if (level.attention or i == len(self.levels) - 1) and level.width % self.head_channels:
                raise UserError(
                    f"{level.width} channels at {level.resolution} px do not divide into heads of {self.head_channels}"
                )

    def heads(self, level: Level) -> int:
        """Attention heads of a level."""
        return level.width // self.head_channels

    @property
    def embedding(self) -> int:
        """Channels of the embedding: the widest level's."""
        return max(level.width for level in self.levels)


# -- blocks


class Attention(nn.Module):
    """Cosine self-attention over all positions of feature maps."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = MPLinear(width, 3 * width)
        self.out = MPLinear(width, width)

    def forward(self, x: Maps) -> Maps:
        # the rows of qkv are (head, channel, qkv)
        parts = rearrange(self.qkv(to_tokens(x)), "b n (h d three) -> three b h n d", h=self.heads, three=3)
        q, k, v = normalize(parts, (-1,)).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return to_image(self.out(rearrange(y, "b h n d -> b n (h d)")), x.shape[2])


class Block(nn.Module):
    """A residual block of the encoder or decoder, with attention or without, resampling first or not.

    Args:
        config: balances and clipping.
        side: "encoder" or "decoder".
        width_in, width: channels in and out.
        dropout: probability between the convolutions.
        heads: attention heads; 0 = no attention.
        resample: "down", "up" or None.
    """

    def __init__(
        self,
        config: EDM2Config,
        side: Literal["encoder", "decoder"],
        width_in: int,
        width: int,
        dropout: float = 0.0,
        heads: int = 0,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.side, self.resample, self.clip = side, resample, config.clip
        self.residual_balance, self.attention_balance = config.residual_balance, config.attention_balance
        self.skip = MPConv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.conv1 = MPConv2d(width if side == "encoder" else width_in, width, 3)
        self.embedding = MPLinear(config.embedding, width)
        self.embedding_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = MPConv2d(width, width, 3)
        self.attention = Attention(width, heads) if heads else None

    def forward(self, x: Maps, embedding: Vectors) -> Float[Tensor, "b c2 h2 w2"]:
        """Features `(b, c, h, w)` and the embedding `(b, e)`; the features."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.side == "encoder":
            x = normalize(self.skip(x), (1,))
        scale = self.embedding(embedding, self.embedding_gain) + 1
        y = silu(self.conv1(silu(x)) * scale[:, :, None, None].to(x.dtype))
        y = self.conv2(self.dropout(y))
        x = mix(self.skip(x) if self.side == "decoder" else x, y, self.residual_balance)
        if self.attention is not None:
            x = mix(x, self.attention(x), self.attention_balance)
        return x.clip(-self.clip, self.clip)


# -- network


def _encoder(c: EDM2Config) -> Iterator[Block]:
    """The way down."""
    width = c.levels[0].width
    for i, level in enumerate(c.levels):
        if i:
            yield Block(c, "encoder", width, width, level.dropout, resample="down")
        heads = c.heads(level) if level.attention else 0
        for _ in range(level.depth):
            yield Block(c, "encoder", width, level.width, level.dropout, heads)
            width = level.width


def _decoder(c: EDM2Config) -> Iterator[Block]:
    """The bottom and the way up."""
    skips, last = _skip_widths(c), c.levels[-1]
    width = skips[-1]
    yield Block(c, "decoder", width, width, last.dropout, c.heads(last))
    yield Block(c, "decoder", width, width, last.dropout)
    for level in reversed(c.levels):
        if level is not last:
            yield Block(c, "decoder", width, width, level.dropout, resample="up")
        heads = c.heads(level) if level.attention else 0
        for _ in range(level.depth + 1):
            yield Block(c, "decoder", width + skips.pop(), level.width, level.dropout, heads)
            width = level.width


def _skip_widths(c: EDM2Config) -> list[int]:
    """Channels of what the decoder reads again: the first convolution and every block of the encoder, in order."""
    widths = [c.levels[0].width]
    for i, level in enumerate(c.levels):
        widths += [widths[-1]] * bool(i) + [level.width] * level.depth
    return widths


class EDM2UNet(Network):
    """The U-Net. `cond.label` where it has classes; the null class, index `num_classes`, is a row of zeros."""

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (Block,)
    any_size = True
    config: EDM2Config

    def __init__(self, config: EDM2Config):
        super().__init__(config)
        c, levels = config, config.levels
        self.noise_features = Fourier(levels[0].width)
        self.noise = MPLinear(levels[0].width, c.embedding)
        self.classes = MPTable(c.num_classes, c.embedding) if c.num_classes else None
        self.conv_in = MPConv2d(c.in_channels + 1, levels[0].width, 3)
        self.encoder = nn.ModuleList(_encoder(c))
        self.decoder = nn.ModuleList(_decoder(c))
        self.conv_out = MPConv2d(levels[0].width, c.in_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(()))
        if c.uncertainty:
            self.uncertainty_features = Fourier(UNCERTAINTY_FEATURES)
            self.uncertainty = MPLinear(UNCERTAINTY_FEATURES, 1)

    def lora_targets(self) -> list[str]:
        """None: a weight is normalised where it is used, so that no product beside it could be merged into it."""
        return []

    def class_tables(self) -> list[str]:
        """The table of classes, which has no row for the null class."""
        return [] if self.classes is None else ["classes.weight"]

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Images:
        self.check_input(z)
        label = self.labels(z, cond)
        z = z.to(self.conv_out.weight.dtype)
        embedding = self._embedding(noise_level, label, z)
        x = self.conv_in(torch.cat([z, torch.ones_like(z[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = self.run(block, x, embedding)
            skips.append(x)
        for i, block in enumerate(self.decoder):
            if i > 1 and block.resample is None:
                x = join(x, skips.pop(), self.config.concat_balance)
            x = self.run(block, x, embedding)
        return self.conv_out(x, self.gain_out)

    def _embedding(self, noise_level: NoiseLevel, label: Tensor | None, like: Tensor) -> Vectors:
        embedding = self.noise(self.noise_features(noise_level).to(like.dtype))
        if self.classes is not None and label is not None:
            embedding = mix(embedding, self.classes(label).to(embedding.dtype), self.config.label_balance)
        return silu(embedding)

    def log_variance(self, noise_level: NoiseLevel) -> Float[Tensor, "b"]:
        """u of the loss error^2 / exp(u) + u, which learns the logarithm of the mean error at each noise level."""
        features = self.uncertainty_features(noise_level)
        return self.uncertainty(features.to(self.uncertainty.weight.dtype))[:, 0]


# -- sizes: arXiv:2312.02696, Table 6


def edm2_levels(image_size: int, base_width: int, dropout: float = 0.0) -> tuple[Level, ...]:
    """Four levels of 1, 2, 3 and 4 times the base width, three blocks each, attention at 16 and 8 of 64 pixels."""
    return tuple(Level(image_size >> i, (i + 1) * base_width, 3, attention=i >= 2, dropout=dropout) for i in range(4))


_WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


def _edm2(size: str, channels: int, classes: int = 1000) -> EDM2Config:
    dropout = 0.0 if size in ("xs", "s") else 0.1
    return EDM2Config(64, channels, num_classes=classes, levels=edm2_levels(64, _WIDTHS[size], dropout))


VARIANTS: dict[str, EDM2Config] = {
    **{f"edm2_{size}_64": _edm2(size, 3) for size in _WIDTHS if size != "xxl"},
    **{f"edm2_{size}_512": _edm2(size, 4) for size in _WIDTHS},
    "edm2_xs_512_uncond": _edm2("xs", 4, 0),
    "edm2_s_512_uncond": _edm2("s", 4, 0),
}

TINY = EDM2Config(
    16,
    3,
    num_classes=10,
    head_channels=8,
    uncertainty=False,
    levels=(Level(16, 16, 1), Level(8, 32, 1, attention=True)),
)

register_variants(EDM2UNet, VARIANTS)
