"""PixNerd: a transformer whose tokens write a small neural field for each patch, which gives the pixels.

Paper: arXiv:2507.23268. An independent implementation that loads the official weights
(`diffzoo.zoo.converters.pixnerd`) and reproduces the official outputs; parameter names are ours.

Notable features
- The deep part is the block of `diffzoo.models.dit` with RMS norms, a gated MLP, RoPE and normalised queries and keys,
  without biases in queries, keys, values and MLP. Time plus class modulate it.
- RoPE alternates between column and row from pair to pair, and positions span [0, 16] on each axis whatever the size:
  other sizes and shapes need no surgery.
- Each pixel of a patch, with cosines of its place in the patch, goes through residual two-layer MLPs whose weights are
  a linear function of the patch's token, with columns of unit length.
- Time is read at frequencies from 1 to 1/10.

Where we differ: the modulation starts at zero and linear layers start as in DiT; the official code keeps PyTorch's
first weights.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.models.base import Network, PatchConfig
from diffzoo.models.dit import EPS, Block, DiTConfig, PatchEmbedding, TimeEmbedding, Turn
from diffzoo.models.registry import register_variants
from diffzoo.nn.embeddings import frequencies
from diffzoo.nn.norms import RMSNorm
from diffzoo.nn.patches import from_patches
from diffzoo.nn.vit_layers import Embedding, XavierLinear
from diffzoo.typing import Condition, Images, NoiseLevel

__all__ = ["TINY", "VARIANTS", "PixNerd", "PixNerdConfig"]

TIME_PERIOD = 10.0
SPAN = 16.0
Pixels = Float[Tensor, "bn pp p"]


@dataclass(frozen=True)
class PixNerdConfig(PatchConfig):
    """The facts of a PixNerd network.

    Args:
        width, depth, heads: of the transformer blocks.
        mlp_ratio: hidden over plain width of the MLP, of which the gated MLP has two thirds.
        pixel_width, pixel_depth: channels of a pixel, and MLPs of the neural field.
        pixel_ratio: hidden over plain width of these.
        waves: frequencies per axis of a pixel's place in its patch.
        dropout: probability on the output of attention and inside the MLP, in the middle half of the blocks.
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    pixel_width: int = 64
    pixel_depth: int = 4
    pixel_ratio: int = 2
    waves: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.block  # checks the fields that the two share

    @property
    def block(self) -> DiTConfig:
        """The facts of the transformer blocks."""
        return DiTConfig(
            self.image_size,
            self.in_channels,
            patch=self.patch,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm="rms",
            mlp="swiglu",
            rope=True,
            qk_norm=True,
            dropout=self.dropout,
        )

    def summary_rows(self) -> list[dict[str, object]]:
        """For `diffzoo describe`: the transformer, and the neural fields."""
        tokens = math.prod(self.grid)
        deep = {"part": "blocks", "tokens": tokens, "width": self.width, "depth": self.depth, "heads": self.heads}
        field = {"part": "pixels", "tokens": self.patch**2 * tokens, "width": self.pixel_width}
        return [deep, {**field, "depth": self.pixel_depth, "heads": 0}]


# -- parts


def _angles(rows: int, columns: int, head_width: int, device: torch.device) -> Float[Tensor, "n pairs"]:
    """Angles of RoPE `(rows columns, head_width / 2)`: even pairs turn with the column, odd ones with the row."""
    f = frequencies(head_width // 4, device).float()
    row, column = (torch.linspace(0, SPAN, n, device=device)[:, None] * f for n in (rows, columns))
    return torch.stack([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], dim=-1).flatten(1)


def _waves(patch: int, count: int, device: torch.device) -> Float[Tensor, "pp w"]:
    """Cosines of a pixel's column and row, `(patch^2, count^2)`, damped where both are fast."""
    place, f = torch.linspace(0, 1, patch, device=device), torch.linspace(0, count, count, device=device)
    wave = torch.cos(math.pi * place[:, None] * f)  # (place, frequency)
    damping = 1 / (1 + f[:, None] * f)
    return torch.einsum("ca,rb,ab->rcab", wave, wave, damping).flatten(2).flatten(0, 1)


class PixelBlock(nn.Module):
    """A residual MLP on the pixels of each patch, with weights that the patch's token gives."""

    def __init__(self, config: PixNerdConfig):
        super().__init__()
        self.inner = config.pixel_width * config.pixel_ratio
        self.norm = RMSNorm(config.pixel_width, eps=EPS)
        self.weights = XavierLinear(config.width, 2 * config.pixel_width * self.inner)

    def forward(self, x: Pixels, token: Float[Tensor, "bn d"]) -> Pixels:
        """Pixels `(b n, patch^2, c)` and tokens `(b n, d)`; the pixels."""
        first, second = self.weights(token).chunk(2, dim=-1)
        first = F.normalize(first.unflatten(-1, (-1, self.inner)), dim=-2)
        second = F.normalize(second.unflatten(-1, (self.inner, -1)), dim=-2)
        return x + F.silu(self.norm(x) @ first) @ second


def _without_bias(block: Block) -> Block:
    for layer in (block.attention.qkv, block.mlp.hidden, block.mlp.out):
        layer.bias = None  # type: ignore[assignment]
    return block


# -- network


class PixNerd(Network):
    """The network. `cond.label` where it has classes."""

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (Block, PixelBlock)
    any_size = True
    config: PixNerdConfig

    def __init__(self, config: PixNerdConfig):
        super().__init__(config)
        c = config
        self.embed = PatchEmbedding(c.block, c.width)
        self.time = TimeEmbedding(c.width, "sinusoid", TIME_PERIOD)
        self.classes = Embedding(c.class_rows, c.width) if c.num_classes else None
        middle = range(c.depth // 4, c.depth // 4 * 3)
        self.blocks = nn.ModuleList(
            _without_bias(Block(c.block, c.width, c.heads, c.dropout if i in middle else 0.0)) for i in range(c.depth)
        )
        self.pixel_embed = XavierLinear(c.in_channels + c.waves**2, c.pixel_width)
        self.pixel_blocks = nn.ModuleList(PixelBlock(c) for _ in range(c.pixel_depth))
        self.norm_out = RMSNorm(c.pixel_width, eps=EPS)
        self.out = XavierLinear(c.pixel_width, c.in_channels, zero=True)

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Images:
        self.check_input(z)
        c, label = self.config, self.labels(z, cond)
        z = z.to(self.out.weight.dtype)
        rows = z.shape[-2] // c.patch
        time = self.time(noise_level)
        vector = time if label is None or self.classes is None else time + self.classes(label)
        x, turn = self.embed(z), self._turn(z)
        for block in self.blocks:
            x = self.run(block, x, vector[:, None], turn)
        tokens = F.silu(time[:, None] + x).flatten(0, 1)
        pixels = self._pixels(z)
        for block in self.pixel_blocks:
            pixels = self.run(block, pixels, tokens)
        pixels = self.out(self.norm_out(pixels))
        return from_patches(pixels.flatten(1).unflatten(0, (len(z), -1)), rows, c.patch)

    def _turn(self, z: Images) -> Turn:
        c = self.config
        rows, columns = (n // c.patch for n in z.shape[-2:])
        angles = _angles(rows, columns, c.width // c.heads, z.device)
        return angles.cos().to(z.dtype), angles.sin().to(z.dtype)

    def _pixels(self, z: Images) -> Pixels:
        """The pixels of all patches, each with the cosines of its place."""
        c = self.config
        patches = F.unfold(z, c.patch, stride=c.patch).mT.flatten(0, 1).unflatten(1, (c.in_channels, -1)).mT
        waves = _waves(c.patch, c.waves, z.device).to(z.dtype).expand(len(patches), -1, -1)
        return self.pixel_embed(torch.cat([patches, waves], dim=-1))


VARIANTS: dict[str, PixNerdConfig] = {
    f"pixnerd_xl_{size}": PixNerdConfig(size, 3, num_classes=1000, width=1152, depth=26, heads=16)
    for size in (256, 512)
}

TINY = PixNerdConfig(16, 3, num_classes=10, patch=4, width=32, depth=4, heads=2, pixel_width=8, pixel_depth=2, waves=4)

register_variants(PixNerd, VARIANTS)
