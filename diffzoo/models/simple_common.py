"""Shared parts of the networks of Simple Diffusion and its successor: input transform, conditioning, output."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.errors import UserError, lacks
from diffzoo.models.base import Level, LevelConfig, Network
from diffzoo.nn.attention import TransformerBlock, to_image, to_tokens
from diffzoo.nn.embeddings import CaptionTokens, NoiseLevelEmbedding, PositionTable
from diffzoo.nn.norms import STANDARD, check_norm, group_norm, zeroed
from diffzoo.nn.patches import InputTransform, transform_factor
from diffzoo.nn.time_dependent import scaled_level
from diffzoo.typing import Condition, Images, Maps, Mask, NoiseLevel, Tokens, Vectors

__all__ = ["Conditioning", "ConvStage", "SimpleConfig", "SimpleNetwork", "Stage", "TransformerStage"]


@dataclass(frozen=True)
class SimpleConfig(LevelConfig):
    """Config of a network of the Simple Diffusion family.

    Args:
        emb_channels: width of the vector that conditions every block.
        noise_range: noise levels that are read as 0 and 1000 of the sinusoid; log-SNR by default.
        input_transform: "none", "patch-p" or "dwt-levels"; another one scales the levels (`LevelConfig.override`).
        text_width: width of the caption embeddings for cross-attention in the transformers; 0 = no text.
        norm: of the blocks: "standard" (group norm on feature maps, layer norm on tokens), "td_ln", "td_rmsn" or
            "rmsn", over the channels of each position. Time-dependent norms read the noise level with `noise_range` at
            -1 and 1. The norms of queries and keys, of captions and before the output stay as they are.
    """

    emb_channels: int = 1024
    noise_range: tuple[float, float] = (-10.0, 10.0)
    input_transform: str = "none"
    text_width: int = 0
    norm: str = STANDARD

    @property
    def input_factor(self) -> int:
        return transform_factor(self.input_transform)

    def check(self) -> None:
        """Raise a sentence if the levels do not fit together."""
        check_norm(self.norm, first_token=False)
        if not self.levels:
            raise UserError(f"{type(self).__name__} needs at least one level")
        self.check_levels()


@dataclass(frozen=True)
class Conditioning:
    """Inputs of every block: the embedding `(b, e)`, caption tokens, the mask of visible ones, and `tau` `(b,)`."""

    emb: Vectors
    context: Tokens | None = None
    visible: Mask | None = None
    tau: NoiseLevel | None = None


Runner = Callable[..., Tensor]


class Stage(nn.Module):
    """Consecutive blocks of one level on one way. Feature maps go in and come out, whatever the blocks work on."""

    def forward(self, x: Maps, given: Conditioning, run: Runner, skips: list[Tensor], record: bool) -> Maps:
        """Run the blocks.

        Args:
            x: feature maps `(b, c, h, w)`.
            given: what the blocks read.
            run: calls a block (`Network.run`).
            skips: on the way down (`record`) the outputs of the blocks are appended; on the way up, blocks that
                take a skip pop theirs.
            record: whether this is the way down.
        """
        raise lacks(self, "forward")


class ConvStage(Stage):
    """Blocks that work on feature maps: called with x, the embedding, a skip where they take one, and tau."""

    def __init__(self, blocks: Iterable[nn.Module], skip: bool = False):
        super().__init__()
        self.skip = skip
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Maps, given: Conditioning, run: Runner, skips: list[Tensor], record: bool) -> Maps:
        for block in self.blocks:
            x = run(block, x, given.emb, skips.pop() if self.skip else None, given.tau)
            if record:
                skips.append(x)
        return x


class TransformerStage(Stage):
    """Transformer blocks of one level; a learned position is added once, where the level is entered with a `grid`."""

    def __init__(
        self,
        level: Level,
        depth: int,
        emb_channels: int,
        context: int,
        skip: bool = False,
        grid: tuple[int, int] | None = None,
        norm: str = STANDARD,
    ):
        super().__init__()
        self.skip = skip
        self.position = PositionTable(grid, level.width) if grid is not None else None
        self.blocks = nn.ModuleList(
            TransformerBlock(level.width, emb_channels, level.heads, level.dropout, skip, context, norm)
            for _ in range(depth)
        )

    def forward(self, x: Maps, given: Conditioning, run: Runner, skips: list[Tensor], record: bool) -> Maps:
        height, width = x.shape[2:]
        x = to_tokens(x)
        if self.position is not None:
            x = self.position(x, (height, width))
        for block in self.blocks:
            skip = to_tokens(skips.pop()) if self.skip else None
            x = run(block, x, given.emb, skip, given.context, given.visible, given.tau)
            if record:
                skips.append(to_image(x, height))
        return to_image(x, height)


class SimpleNetwork(Network):
    """Input transform and convolution, conditioning, and the zero-initialised output around a family's `trunk`.

    Feature maps are kept in the channels-last layout: convolutions are faster in it, and tokens are then a view.
    """

    any_size = True
    config: SimpleConfig

    def __init__(self, config: SimpleConfig):
        config.check()
        super().__init__(config)
        levels, width = config.levels, config.levels[0].width
        self.transform = InputTransform(config.input_transform)
        channels, k = config.in_channels * self.transform.factor**2, self.transform.kernel_size
        self.conv_in = nn.Conv2d(channels, width, k, padding=k // 2)
        self.conditioning = NoiseLevelEmbedding(config.emb_channels, config.noise_range, config.class_rows)
        self.caption = CaptionTokens(config.text_width, config.emb_channels) if config.text_width else None
        self.norm_out = group_norm(width)
        self.conv_out = zeroed(nn.Conv2d(width, channels, k, padding=k // 2))
        self.halving = [(a.width, b.width) for a, b in pairwise(levels)]

    def position_tables(self) -> dict[str, tuple[int, int, int]]:
        return {f"{n}.table": (0, *m.grid) for n, m in self.named_modules() if isinstance(m, PositionTable)}

    def trunk(self, h: Maps, given: Conditioning) -> Maps:
        """Feature maps of the first level to feature maps of the first level."""
        raise lacks(self, "trunk")

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Images:
        self.check_input(z)
        emb = self.conditioning(noise_level, self.labels(z, cond))
        given = Conditioning(emb, *self.read_caption(z, cond), scaled_level(noise_level, *self.config.noise_range))
        x = self.transform(z.to(self.conv_in.weight.dtype)).contiguous(memory_format=torch.channels_last)
        h = self.trunk(self.conv_in(x), given)
        return self.transform.inverse(self.conv_out(F.silu(self.norm_out(h))))

    def read_caption(self, z: Images, cond: Condition | None) -> tuple[Tokens | None, Mask | None]:
        """Caption tokens and which are visible, checked; Nones where this network takes no text.

        Raises:
            UserError: for text without a place for it, a missing caption, or another width or batch size.
        """
        text = cond.text if cond is not None else None
        if self.caption is None:
            if text is not None:
                raise UserError("this network takes no text: leave out the caption embeddings")
            return None, None
        width = self.config.text_width
        if text is None:
            raise UserError(f"this network draws from captions: give it text embeddings of shape (b, n, {width})")
        if text.ndim != 3 or len(text) != len(z) or text.shape[2] != width:
            raise UserError(f"expected text embeddings ({len(z)}, n, {width}), got {tuple(text.shape)}")
        tokens: tuple[Tensor, Tensor] = self.caption(text, cond.text_mask if cond is not None else None)
        return tokens
