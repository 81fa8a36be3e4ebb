"""The U-Net of Simple Diffusion: pixel-space diffusion at 128 to 512 px with most of the work at 16 x 16.

Paper: Hoogeboom, Heek, Salimans, "simple diffusion: End-to-end diffusion for high resolution images", ICML 2023,
arXiv:2301.11093. No code or weights were released; this is written from the paper's description.

Notable features
- Blocks are few at high resolution and many at 16 x 16 (12 down, 13 up), where they are cheap in memory.
- Average pooling down, nearest neighbour up, each with a 1x1 projection.
- Attention at 16 x 16 and 8 x 8, after every residual block, with normalised queries and keys.
- Every block of the way down (and each level's input) has a skip to the way up, added, not concatenated:
  (Norm(x) + Norm(skip)) / sqrt(2).
- Dropout only from 16 x 16 down (Table 2 of the paper has the ablation); one argument, `dropout_from_resolution`.
- At 512 px the input is taken by two levels of the 5/3 wavelet to 48 x 128 x 128, or by 4 x 4 patches.

Unverified (not in the paper's text, taken from independent re-implementations): the additive skip fusion, the
normalised queries and keys, the range in which log-SNR is read, biases. Parameter counts are derived, not published.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.base import Level
from diffzoo.models.registry import register_variants
from diffzoo.models.simple_common import Conditioning, ConvStage, SimpleConfig, SimpleNetwork, Stage
from diffzoo.nn.attention import ImageAttention
from diffzoo.nn.convs import Downsample, ResBlock, Upsample
from diffzoo.nn.norms import STANDARD
from diffzoo.typing import Maps, NoiseLevel, Vectors

__all__ = ["TINY", "VARIANTS", "SimpleUNet", "SimpleUNetConfig"]


@dataclass(frozen=True)
class SimpleUNetConfig(SimpleConfig):
    """Config of `SimpleUNet`. A level has `depth` blocks on the way down and `depth + 1` on the way up.

    `norm` is that of the residual blocks, their skips and the attention after them.
    """

    def check(self) -> None:
        super().check()
        if self.text_width:
            raise UserError("the U-Net has no cross-attention: for captions take a simple_uvit_t2i_* network")


# -- blocks


class UNetBlock(nn.Module):
    """A residual block and, at attention levels, self-attention after it."""

    def __init__(
        self,
        level: Level,
        emb_channels: int,
        skip: bool = False,
        attention: bool | None = None,
        norm: str = STANDARD,
    ):
        super().__init__()
        attention = level.attention if attention is None else attention
        self.res = ResBlock(level.width, emb_channels, level.dropout, skip, norm)
        self.attention = ImageAttention(level.width, level.heads, norm) if attention else None

    def forward(self, x: Maps, emb: Vectors, skip: Maps | None = None, tau: NoiseLevel | None = None) -> Maps:
        """Features `(b, c, h, w)`, conditioning `(b, e)`, a skip of x's shape on the way up, and `tau` `(b,)`."""
        y: Maps = self.res(x, emb, skip, tau)
        return y if self.attention is None else self.attention(y, tau)


# -- network


class SimpleUNet(SimpleNetwork):
    """U-Net of arXiv:2301.11093, Fig. 8."""

    unit_types = (UNetBlock,)
    config: SimpleUNetConfig

    def __init__(self, config: SimpleUNetConfig):
        super().__init__(config)
        levels, last = config.levels, config.levels[-1]
        self.down = nn.ModuleList(self._stage(v, v.depth) for v in levels)
        self.shrink = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in self.halving)
        self.middle = ConvStage([self._block(last), self._block(last, attention=False)])
        self.grow = nn.ModuleList(Upsample(coarse, fine) for fine, coarse in self.halving)
        self.up = nn.ModuleList(self._stage(v, v.depth + 1, skip=True) for v in levels)

    def _block(self, level: Level, skip: bool = False, attention: bool | None = None) -> UNetBlock:
        return UNetBlock(level, self.config.emb_channels, skip, attention, self.config.norm)

    def _stage(self, level: Level, depth: int, skip: bool = False) -> Stage:
        return ConvStage((self._block(level, skip) for _ in range(depth)), skip)

    def trunk(self, h: Maps, given: Conditioning) -> Maps:
        skips: list[Tensor] = []
        for i, stage in enumerate(self.down):
            h = self.shrink[i - 1](h) if i else h
            skips.append(h)
            h = stage(h, given, self.run, skips, record=True)
        h = self.middle(h, given, self.run, skips, record=False)
        for i, stage in reversed(list(enumerate(self.up))):
            h = stage(h, given, self.run, skips, record=False)
            h = self.grow[i - 1](h) if i else h
        return h


# -- sizes


def _levels(finest: int, widths: tuple[int, ...], depths: tuple[int, ...], dropout: float = 0.1) -> tuple[Level, ...]:
    """Levels from `finest` px down; attention and dropout from 16 px down, as all published configurations have it."""
    return tuple(
        Level(finest >> i, w, d, attention=finest >> i <= 16, dropout=dropout if finest >> i <= 16 else 0.0)
        for i, (w, d) in enumerate(zip(widths, depths, strict=True))
    )


def _imagenet(
    image_size: int, transform: str, multipliers: tuple[int, ...], depths: tuple[int, ...]
) -> SimpleUNetConfig:
    finest = image_size // SimpleUNetConfig(input_transform=transform).input_factor
    widths = tuple(128 * m for m in multipliers)
    return SimpleUNetConfig(
        image_size=image_size,
        num_classes=1000,
        input_transform=transform,
        levels=_levels(finest, widths, depths),
    )


def _small(image_size: int, widths: tuple[int, ...], depths: tuple[int, ...]) -> SimpleUNetConfig:
    return SimpleUNetConfig(image_size=image_size, emb_channels=512, levels=_levels(image_size, widths, depths))


VARIANTS = {
    # arXiv:2301.11093, appendix: the configurations of ImageNet
    "simple_unet_128": _imagenet(128, "none", (1, 2, 4, 8, 8), (3, 4, 4, 12, 4)),
    "simple_unet_256": _imagenet(256, "none", (1, 1, 2, 4, 8, 8), (1, 2, 2, 4, 12, 4)),
    "simple_unet_512": _imagenet(512, "dwt-2", (2, 3, 4, 8, 8), (3, 3, 4, 12, 4)),
    # Table 5, early downsampling; with conv patches: `input_transform="patch-2"` here, "patch-4" at simple_unet_512
    "simple_unet_512_dwt1": _imagenet(512, "dwt-1", (1, 2, 2, 4, 8, 8), (2, 2, 2, 4, 12, 4)),
    "simple_unet_512_full": _imagenet(512, "none", (1, 1, 1, 2, 4, 8, 8), (1, 1, 2, 2, 4, 12, 4)),
    # ours, for one consumer GPU
    "simple_unet_s_32": _small(32, (96, 192, 256), (2, 3, 2)),
    "simple_unet_s_64": _small(64, (64, 128, 256, 256), (2, 2, 4, 2)),
    "simple_unet_b_64": _small(64, (128, 256, 512, 512), (2, 3, 6, 2)),
}
TINY = SimpleUNetConfig(
    image_size=16,
    num_classes=3,
    emb_channels=16,
    levels=(Level(16, 8, 1), Level(8, 16, 2, attention=True, heads=2, dropout=0.1)),
)

register_variants(SimpleUNet, VARIANTS)
