"""The U-ViT of Simple Diffusion: convolutional levels around a large transformer at 16 x 16.

Paper: Hoogeboom, Heek, Salimans, "simple diffusion: End-to-end diffusion for high resolution images", ICML 2023,
arXiv:2301.11093. No code or weights were released; this is written from the paper's description. Not to be confused
with the U-ViT of Bao et al. (`uvit_bao_*`).

Notable features
- Two residual blocks at 128^2, 64^2 and 32^2, then 36 transformer blocks of width 2048 on 256 tokens: 2.45 B
  parameters (stated: "2 B"), the same trunk at all three image sizes.
- The image reaches 128 x 128 by no, one or two levels of the 5/3 wavelet.
- A transformer block is MLP first, then self-attention, with plain residual sums and no skips across the transformer.
  The noise level and class scale and shift the MLP's hidden layer.
- Skips between convolutional blocks are added, as in the U-Net; the way up has one block more per level.
- Dropout in the transformer only.
- Text-to-image: cross-attention in every transformer block to the tokens of a frozen T5-XXL, with a learned token for
  the empty caption; at 32^2 transformer blocks replace the convolutional ones.

Unverified: up counts of depth + 1 (546 G multiply-adds so, 532 G without; 555 G is quoted), the learned positions
added once, the additive skip fusion, normalised queries and keys, biases, dropout's place within a block, and of the
text-to-image networks everything but the sentence above (the paper states no widths for them).
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from diffzoo.models.base import Level
from diffzoo.models.registry import register_model
from diffzoo.models.simple_common import Conditioning, ConvStage, SimpleConfig, SimpleNetwork, Stage, TransformerStage
from diffzoo.nn.attention import TransformerBlock
from diffzoo.nn.convs import Downsample, ResBlock, Upsample
from diffzoo.typing import Maps

__all__ = ["TINY", "TINY_TEXT", "VARIANTS", "SimpleUViT", "SimpleUViTConfig"]


@dataclass(frozen=True)
class SimpleUViTConfig(SimpleConfig):
    """Config of `SimpleUViT`.

    The coarsest level is the transformer, of `depth` blocks. The others have `depth` blocks on the way down and
    `depth + 1` on the way up: transformer blocks where `attention` is set, residual blocks elsewhere. `norm` is that
    of all blocks and their skips, before self- and cross-attention and the MLP.
    """


class SimpleUViT(SimpleNetwork):
    """U-ViT of arXiv:2301.11093."""

    unit_types = (ResBlock, TransformerBlock)
    config: SimpleUViTConfig

    def __init__(self, config: SimpleUViTConfig):
        super().__init__(config)
        outer, last = config.levels[:-1], config.levels[-1]
        context = config.emb_channels if config.text_width else 0
        self.down = nn.ModuleList(self._stage(v, v.depth) for v in outer)
        self.shrink = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in self.halving)
        self.middle = TransformerStage(
            last, last.depth, config.emb_channels, context, grid=config.grid(last), norm=config.norm
        )
        self.grow = nn.ModuleList(Upsample(coarse, fine) for fine, coarse in self.halving)
        self.up = nn.ModuleList(self._stage(v, v.depth + 1, skip=True) for v in outer)

    def _stage(self, level: Level, depth: int, skip: bool = False) -> Stage:
        emb, norm = self.config.emb_channels, self.config.norm
        if not level.attention:
            return ConvStage((ResBlock(level.width, emb, level.dropout, skip, norm) for _ in range(depth)), skip)
        context = emb if self.config.text_width else 0
        grid = None if skip else self.config.grid(level)
        return TransformerStage(level, depth, emb, context, skip, grid, norm)

    def trunk(self, h: Maps, given: Conditioning) -> Maps:
        skips: list[Tensor] = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(h)
            h = shrink(stage(h, given, self.run, skips, record=True))
        h = self.middle(h, given, self.run, [], record=False)
        for stage, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = stage(grow(h), given, self.run, skips, record=False)
        return h


# -- sizes


def _imagenet(image_size: int, transform: str) -> SimpleUViTConfig:
    return SimpleUViTConfig(
        image_size=image_size,
        num_classes=1000,
        input_transform=transform,
        levels=(
            Level(128, 128, 2),
            Level(64, 256, 2),
            Level(32, 512, 2),
            Level(16, 2048, 36, attention=True, heads=4, dropout=0.2),
        ),
    )


def _text_to_image(config: SimpleUViTConfig) -> SimpleUViTConfig:
    levels = tuple(replace(v, attention=v.resolution <= 32) for v in config.levels)
    return replace(config, num_classes=0, text_width=4096, levels=levels)


def _small(
    image_size: int,
    transform: str,
    emb: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    heads: int,
    dropout: float = 0.1,
) -> SimpleUViTConfig:
    finest = image_size // SimpleUViTConfig(input_transform=transform).input_factor
    outer = tuple(Level(finest >> i, w, d) for i, (w, d) in enumerate(zip(widths[:-1], depths[:-1], strict=True)))
    last = Level(finest >> len(outer), widths[-1], depths[-1], attention=True, heads=heads, dropout=dropout)
    return SimpleUViTConfig(image_size=image_size, emb_channels=emb, input_transform=transform, levels=(*outer, last))


VARIANTS = {
    # arXiv:2301.11093, appendix: the configurations of ImageNet
    "simple_uvit_128": _imagenet(128, "none"),
    "simple_uvit_256": _imagenet(256, "dwt-1"),
    "simple_uvit_512": _imagenet(512, "dwt-2"),
    # text-to-image
    "simple_uvit_t2i_256": _text_to_image(_imagenet(256, "dwt-1")),
    "simple_uvit_t2i_512": _text_to_image(_imagenet(512, "dwt-2")),
    # ours, for one consumer GPU
    "simple_uvit_s_32": _small(32, "none", 512, (128, 256, 384), (2, 2, 12), heads=6),
    "simple_uvit_s_64": _small(64, "patch-2", 512, (128, 256, 512), (2, 2, 12), heads=8),
    "simple_uvit_b_64": _small(64, "none", 768, (128, 256, 768), (2, 2, 16), heads=12),
    # ours, for a few minutes on a CPU
    "simple_uvit_xs_32": _small(32, "patch-2", 128, (48, 128), (2, 4), heads=4, dropout=0.0),
    # ours, for an hour on a CPU: captions by MiniLM
    "simple_uvit_t2i_xs_64": replace(
        _small(64, "patch-4", 128, (48, 192), (1, 3), heads=3, dropout=0.0), text_width=384
    ),
}
TINY = SimpleUViTConfig(
    image_size=16,
    num_classes=3,
    emb_channels=16,
    levels=(Level(16, 8, 1), Level(8, 16, 2, attention=True, heads=2, dropout=0.1)),
)

TINY_TEXT = replace(TINY, num_classes=0, text_width=12)

NOTES = {
    "simple_uvit_t2i_256": "sizes of the text-to-image networks are not published: these are inferred",
    "simple_uvit_t2i_512": "sizes of the text-to-image networks are not published: these are inferred",
}

for _name, _variant in VARIANTS.items():
    register_model(_name, SimpleUViT, _variant, NOTES.get(_name, ""))
