"""The residual U-ViT of Simpler Diffusion: one residual skip per level instead of one per block.

Paper: Hoogeboom et al., "Simpler Diffusion (SiD2): 1.5 FID on ImageNet512 with pixel-space diffusion", CVPR 2025,
arXiv:2410.19324. No code or weights were released; this is written from the paper's description and from the sizes that
the same authors print for their 64 and 128 px networks in arXiv:2403.06807, appendix A.1.

Notable features
- Three levels of three blocks down and three up around 16 transformer blocks of width 1024 at 16 x 16; the coarser two
  levels are transformers, the finer ones residual convolutions.
- One skip per level: with `low = down(before)` going in and `mid` coming back from below,
  `h = up(mid - low) + before`. Nothing is concatenated, and no block needs to know of a skip.
- "Flop-heavy" scaling: the same network on a patch half as large (`_p1_` for `_p2_`), so four times the positions with
  the same parameters: 137.4 and 652.8 G multiply-adds for 0.40 B parameters.
- FiLM acts on the hidden layer of the MLP, which the published parameter counts confirm (397 M at 128 px, 394 M at 64).

Unverified: heads (4), the learned positions, normalised queries and keys, dropout per level, and the place of
projections (1x1, after pooling and before upsampling, which the multiply-adds confirm).
"""

from dataclasses import dataclass

from torch import nn

from diffzoo.models.base import Level
from diffzoo.models.registry import register_variants
from diffzoo.models.simple_common import Conditioning, ConvStage, SimpleConfig, SimpleNetwork, Stage, TransformerStage
from diffzoo.nn.attention import TransformerBlock
from diffzoo.nn.convs import Downsample, ResBlock, Upsample
from diffzoo.typing import Maps

__all__ = ["TINY", "VARIANTS", "SimplerUViT", "SimplerUViTConfig"]


@dataclass(frozen=True)
class SimplerUViTConfig(SimpleConfig):
    """Config of `SimplerUViT`.

    The coarsest level is the middle, of `depth` transformer blocks. The others have `depth` blocks on either way:
    transformer blocks where `attention` is set, residual blocks elsewhere. `norm` is that of all blocks.
    """


class SimplerUViT(SimpleNetwork):
    """Residual U-ViT of arXiv:2410.19324."""

    unit_types = (ResBlock, TransformerBlock)
    config: SimplerUViTConfig

    def __init__(self, config: SimplerUViTConfig):
        super().__init__(config)
        outer, last = config.levels[:-1], config.levels[-1]
        self.down = nn.ModuleList(self._stage(v) for v in outer)
        self.shrink = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in self.halving)
        self.middle = self._stage(last)
        self.grow = nn.ModuleList(Upsample(coarse, fine) for fine, coarse in self.halving)
        self.up = nn.ModuleList(self._stage(v, position=False) for v in outer)

    def _stage(self, level: Level, position: bool = True) -> Stage:
        emb, norm = self.config.emb_channels, self.config.norm
        if not level.attention and level != self.config.levels[-1]:
            return ConvStage(ResBlock(level.width, emb, level.dropout, norm=norm) for _ in range(level.depth))
        context = emb if self.config.text_width else 0
        grid = self.config.grid(level) if position else None
        return TransformerStage(level, level.depth, emb, context, grid=grid, norm=norm)

    def trunk(self, h: Maps, given: Conditioning) -> Maps:
        entered = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            before = stage(h, given, self.run, [], record=False)
            h = shrink(before)
            entered.append((before, h))
        h = self.middle(h, given, self.run, [], record=False)
        for stage, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            before, low = entered.pop()
            h = stage(grow(h - low) + before, given, self.run, [], record=False)
        return h


# -- sizes


def _imagenet(image_size: int, transform: str, levels: tuple[Level, ...]) -> SimplerUViTConfig:
    return SimplerUViTConfig(image_size=image_size, num_classes=1000, input_transform=transform, levels=levels)


def _levels(finest: int, middle_dropout: float) -> tuple[Level, ...]:
    """The four levels from `finest` px down."""
    return (
        Level(finest, 128, 3),
        Level(finest // 2, 256, 3),
        Level(finest // 4, 512, 3, attention=True),
        Level(finest // 8, 1024, 16, attention=True, dropout=middle_dropout),
    )


VARIANTS = {
    # arXiv:2403.06807, appendix A.1, "small": dropout in the middle only, 0.2 at 64 px and 0.1 at 128 px
    "simpler_uvit_64": _imagenet(64, "none", _levels(128, 0.2)[1:]),
    "simpler_uvit_128": _imagenet(128, "none", _levels(128, 0.1)),
    # arXiv:2410.19324: UViT/2 and UViT/1 at 256 px, UViT/4 and UViT/2 at 512 px
    "simpler_uvit_p2_256": _imagenet(256, "patch-2", _levels(128, 0.1)),
    "simpler_uvit_p1_256": _imagenet(256, "none", _levels(256, 0.1)),
    "simpler_uvit_p4_512": _imagenet(512, "patch-4", _levels(128, 0.1)),
    "simpler_uvit_p2_512": _imagenet(512, "patch-2", _levels(256, 0.1)),
}
TINY = SimplerUViTConfig(
    image_size=16,
    num_classes=3,
    emb_channels=16,
    levels=(
        Level(16, 8, 1),
        Level(8, 16, 1, attention=True, heads=2),
        Level(4, 16, 2, attention=True, heads=2, dropout=0.1),
    ),
)

register_variants(SimplerUViT, VARIANTS)
