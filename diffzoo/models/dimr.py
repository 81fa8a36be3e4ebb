"""DiMR: a denoiser of several resolutions, each stage refining the features of the one before.

Paper: "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", arXiv:2406.09416. Reference implementation: github.com/qihao067/DiMR (Apache-2.0). This is an
independent implementation that loads the official weights (`diffzoo.zoo.converters.dimr`) and reproduces the official
outputs; parameter names are ours.

Notable features
- Every stage sees the same noisy image; a later stage also reads all intermediate features of the one before it.
- Every stage predicts the noise at its own resolution; only the last prediction is used for sampling.
- Coarse stages are transformers, fine ones ConvNeXt blocks; within a stage, long skips join early and late blocks.
- Time enters only through time-dependent norms (`diffzoo.nn.time_dependent`): no time token, no adaptive layer norm.
- The class is one token in the transformer stages.
- The number it reads grows with noise from -4 to 4: `8 t - 4` (`TimeConditioning(8, -4)`), not a log-SNR.

Where we differ: blocks are not recomputed in the backward pass unless asked, attention runs in the working precision,
the features of the last stage are not collected, `forward` skips the outputs that sampling does not use, rotary
positions work together with a class token (which is not rotated) and on every device, and a text condition can be
given (the reference has the layers but cannot reach them).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffzoo.errors import UserError, check_choice, did_you_mean
from diffzoo.models.base import Config, Network, rewritten, take_rewrites
from diffzoo.models.registry import register_model
from diffzoo.nn.attention import attend, split_heads
from diffzoo.nn.axial_rope import AxialRotary, QueryKeyNorm, axial_positions
from diffzoo.nn.embeddings import resample_grid
from diffzoo.nn.time_dependent import NORMS, TimeDependentLayerNorm, build_norm
from diffzoo.nn.vit_layers import Conv2d, Embedding, Linear, with_long_skips
from diffzoo.sizes import size_text
from diffzoo.typing import Condition, Images, NoiseLevel, Tokens

__all__ = ["TINY", "VARIANTS", "DiMR", "DiMRConfig", "DiMRStage"]

Kind = Literal["transformer", "convnext"]
Positions = Literal["learned", "axial_rope"]
Run = Callable[..., Tensor]
Channels = Float[Tensor, "b *n d"]
LastMaps = Float[Tensor, "b h w d"]  # channels last
Below = Float[Tensor, "b rows columns features"]
Places = Float[Tensor, "n 2"]
Text = Float[Tensor, "b m text"]
TextMask = Bool[Tensor, "b m"]


# -- config


@dataclass(frozen=True)
class DiMRStage:
    """One stage.

    Args:
        kind: "transformer" or "convnext".
        grid: rows and columns of its feature maps at the largest input.
        width: channels.
        hidden: channels inside the gated MLP.
        depth: blocks, an odd number: some down, one in the middle, as many up.
        image_ratio: the input is averaged down by this factor first.
        patch: then cut into patches of this many pixels.
        heads: attention heads of a transformer stage.
        kernel_size: of the depthwise convolutions of a ConvNeXt stage.
        head_kernel_size: of the output convolution.
        dropout: probability on the residual branches.
    """

    kind: Kind
    grid: tuple[int, int]
    width: int
    hidden: int
    depth: int
    image_ratio: int = 1
    patch: int = 1
    heads: int = 1
    kernel_size: int = 7
    head_kernel_size: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("the kind of a stage", self.kind, Kind)
        if self.depth % 2 == 0:
            raise UserError(f"the depth of a stage is odd (down, middle, up), got {self.depth}")
        if self.kind == "transformer" and self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}")

    @property
    def resolution(self) -> int:
        """Rows of the largest feature map: the name of the stage in `depth_at` and the like."""
        return self.grid[0]

    @property
    def ratio(self) -> int:
        """Input pixels per cell."""
        return self.image_ratio * self.patch

    @property
    def largest_input(self) -> tuple[int, int]:
        """Rows and columns of the largest input that the position table serves."""
        return self.grid[0] * self.ratio, self.grid[1] * self.ratio


@dataclass(frozen=True)
class DiMRConfig(Config):
    """The config of a DiMR network.

    Args:
        image_size: the usual input; every other that the stages divide works too. One that fits into the position
            tables reads their upper left corner, as in the reference; for any other they are resampled.
        stages: coarse to fine. A stage predicts one value per cell, so that the last one has a cell for every pixel.
        norm: of the blocks, one of `diffzoo.nn.time_dependent.NORMS`; between stages it is always "td_ln".
        positions: "learned" tables, or "axial_rope" with query-key norm in the transformer stages.
        detach_features: stop the gradient between stages.
        text_width: channels of text embeddings that attention reads as extra keys and values; 0 = none.
    """

    stages: tuple[DiMRStage, ...] = ()
    norm: str = "td_rmsn"
    positions: Positions = "learned"
    detach_features: bool = False
    text_width: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise UserError("a DiMR needs at least one stage")
        if self.norm not in NORMS:
            raise UserError(f"unknown norm {self.norm!r}{did_you_mean(self.norm, NORMS)}")
        check_choice("positions", self.positions, Positions)
        _check_stages(self.stages, self.positions)
        if any(side % self.cell for side in self.sides):
            raise UserError(f"image_size {size_text(self.image_size)} does not divide by {self.cell}, the largest cell")

    @property
    def cell(self) -> int:
        return max((stage.ratio for stage in self.stages), default=1)

    def _grown(self) -> Self:
        """With grids that serve `image_size`: those of an input that does not fit into the tables become its own."""
        rows, columns = self.sides
        largest = self.stages[-1].largest_input
        if rows <= largest[0] and columns <= largest[1]:
            return self
        return replace(self, stages=tuple(replace(s, grid=(rows // s.ratio, columns // s.ratio)) for s in self.stages))

    def override(self, **overrides: object) -> Self:
        """Replace fields; `depth_at`, `width_at` and `dropout_from_resolution` refer to the rows of a stage's grid.

        `width_at` keeps the ratio of hidden to plain width, `dropout` applies to all stages, or to those of at most
        `dropout_from_resolution` rows.
        """
        rewrites = take_rewrites(overrides)
        config = super().override(**overrides)
        config = config if "stages" in overrides else config._grown()
        stages = rewritten(config.stages, rewrites)
        pairs = zip(stages, config.stages, strict=True)
        return replace(config, stages=tuple(replace(s, hidden=o.hidden * s.width // o.width) for s, o in pairs))


def _check_stages(stages: Sequence[DiMRStage], positions: Positions) -> None:
    """Refuse stages that do not fit each other or the positions."""
    largest = stages[-1].largest_input
    for stage in stages:
        if stage.kind == "transformer" and positions == "axial_rope" and stage.width // stage.heads % 4:
            raise UserError(f"axial_rope needs heads of a multiple of 4 channels, got {stage.width // stage.heads}")
        if stage.largest_input != largest:
            raise UserError(
                f"all stages must see one largest input: the last one's is {largest}, but a grid of "
                f"{stage.grid} with {stage.ratio} pixels per cell says otherwise"
            )
    for coarse, fine in pairwise(stages):
        ratio = fine.grid[0] // coarse.grid[0]
        if ratio < 1 or fine.grid != (ratio * coarse.grid[0], ratio * coarse.grid[1]):
            raise UserError(f"stages go coarse to fine in whole factors, got grids {coarse.grid} and {fine.grid}")


# -- blocks: maps (b, h, w, c) and tokens (b, n, c), channels last


class Attention(nn.Module):
    """Self-attention with the norm inside; text tokens, if any, are further keys and values."""

    def __init__(self, stage: DiMRStage, config: DiMRConfig):
        super().__init__()
        self.heads = stage.heads
        self.norm = build_norm(config.norm, stage.width)
        self.qkv = Linear(stage.width, 3 * stage.width, bias=False)
        self.text_kv = Linear(config.text_width, 2 * stage.width, bias=False) if config.text_width else None
        rotary = config.positions == "axial_rope"
        self.rotary = AxialRotary(stage.width // stage.heads, stage.heads) if rotary else None
        self.qk_norm = QueryKeyNorm(stage.heads) if rotary else None
        self.out = Linear(stage.width, stage.width)

    def forward(
        self, x: Tokens, tau: NoiseLevel, positions: Places | None, text: Text | None, text_mask: TextMask | None
    ) -> Tokens:
        q, k, v = split_heads(self.qkv(self.norm(x, tau)), 3, self.heads)
        if self.rotary is not None and self.qk_norm is not None and positions is not None:
            q, k = (self.rotary(self.qk_norm(part), positions) for part in (q, k))
        mask = None
        if self.text_kv is not None and text is not None:
            text_k, text_v = split_heads(self.text_kv(text), 2, self.heads)
            k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
            if text_mask is not None:
                mask = F.pad(text_mask, (x.shape[1], 0), value=True)[:, None, None]
        return self.out(attend(q, k, v, mask))


class GatedMLP(nn.Module):
    """Norm, then GELU(gate) * value, then a projection."""

    def __init__(self, stage: DiMRStage, config: DiMRConfig):
        super().__init__()
        self.norm = build_norm(config.norm, stage.width)
        self.gate = Linear(stage.width, stage.hidden)
        self.value = Linear(stage.width, stage.hidden)
        self.out = Linear(stage.hidden, stage.width)

    def forward(self, x: Channels, tau: NoiseLevel) -> Channels:
        x = self.norm(x, tau)
        return self.out(F.gelu(self.gate(x)) * self.value(x))


class TransformerBlock(nn.Module):
    """Attention and gated MLP on tokens."""

    def __init__(self, stage: DiMRStage, config: DiMRConfig):
        super().__init__()
        self.attention = Attention(stage, config)
        self.mlp = GatedMLP(stage, config)
        self.dropout = nn.Dropout(stage.dropout)

    def forward(
        self,
        x: Tokens,
        tau: NoiseLevel,
        positions: Places | None = None,
        text: Text | None = None,
        text_mask: TextMask | None = None,
    ) -> Tokens:
        x = x + self.dropout(self.attention(x, tau, positions, text, text_mask))
        return x + self.dropout(self.mlp(x, tau))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, without a norm before it, and gated MLP on maps."""

    def __init__(self, stage: DiMRStage, config: DiMRConfig):
        super().__init__()
        width, kernel = stage.width, stage.kernel_size
        self.conv = Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.mlp = GatedMLP(stage, config)
        self.dropout = nn.Dropout(stage.dropout)

    def forward(self, x: LastMaps, tau: NoiseLevel) -> LastMaps:
        # the permuted view is what PyTorch calls channels_last: no copy on the way in or out
        x = x + self.dropout(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.dropout(self.mlp(x, tau))


class Upsample(nn.Module):
    """All features of the coarser stage to one map of this stage's grid.

    A linear layer makes `ratio x ratio` cells of each, in the order (row, column, channel).
    """

    def __init__(self, width_in: int, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.norm_in = TimeDependentLayerNorm(width_in)
        self.expand = Linear(width_in, width * ratio * ratio)
        self.norm_out = TimeDependentLayerNorm(width)

    def forward(self, features: LastMaps, tau: NoiseLevel) -> Float[Tensor, "b h2 w2 c2"]:
        r = self.ratio
        x = self.expand(self.norm_in(features, tau)).unflatten(-1, (r, r, -1))
        return self.norm_out(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), tau)


class Head(nn.Module):
    """A stage's prediction."""

    def __init__(self, stage: DiMRStage, channels: int):
        super().__init__()
        k = stage.head_kernel_size
        self.norm = TimeDependentLayerNorm(stage.width)
        self.conv = Conv2d(stage.width, channels, k, padding=k // 2)

    def forward(self, x: LastMaps, tau: NoiseLevel) -> Float[Tensor, "b c2 h w"]:
        return self.conv(self.norm(x, tau).permute(0, 3, 1, 2))


# -- stages and network


def _positions(table: Tensor, grid: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Positions of an input's cells, `(rows, columns, width)`: a corner of the table, or all of it, resampled."""
    if rows > grid[0] or columns > grid[1]:
        return resample_grid(table, grid, (rows, columns)).unflatten(0, (rows, columns))
    return table.unflatten(0, grid)[:rows, :columns]


class Stage(nn.Module):
    """One resolution: patches, features of the stage before, blocks with long skips, a head."""

    def __init__(self, stage: DiMRStage, config: DiMRConfig, below: DiMRStage | None):
        super().__init__()
        self.metadata, width = stage, stage.width
        transformer = stage.kind == "transformer"
        self.rotary = transformer and config.positions == "axial_rope"
        self.patch = Conv2d(config.in_channels, width, stage.patch, stride=stage.patch)
        if self.rotary:
            # in the official state dict and read by nothing: kept, so that weights convert there and back unchanged
            spare = AxialRotary(width, stage.heads)
            self.register_buffer("unused_row", spare.log_frequencies_row.detach())
            self.register_buffer("unused_column", spare.log_frequencies_column.detach())
        else:
            self.positions = nn.Parameter(Embedding(stage.grid[0] * stage.grid[1], width).weight.detach())
        self.upsample = None
        if below is not None:
            self.upsample = Upsample(below.width * (below.depth + 1), width, stage.grid[0] // below.grid[0])
        self.class_table = Embedding(config.class_rows, width) if transformer and config.num_classes else None
        block = TransformerBlock if transformer else ConvNeXtBlock
        self.blocks = nn.ModuleList(block(stage, config) for _ in range(stage.depth))
        self.skips = nn.ModuleList(Linear(2 * width, width) for _ in range(stage.depth // 2))
        self.head = Head(stage, config.in_channels)

    def forward(
        self, z: Images, tau: NoiseLevel, below: Below | None, cond: Condition, run: Run, keep: bool
    ) -> tuple[Float[Tensor, "b h2 w2 d"], list[Float[Tensor, "b h2 w2 d"]]]:
        """The last map `(b, h, w, c)`, and all intermediate ones if `keep`."""
        x = self._enter(z, tau, below)
        rows, columns = x.shape[1:3]
        tokens = self.metadata.kind == "transformer"
        extra = 0
        inputs: tuple[object, ...] = ()
        if tokens:
            x = x.flatten(1, 2)
            if self.class_table is not None:
                x, extra = torch.cat([self.class_table(cond.label)[:, None].to(x.dtype), x], dim=1), 1
            places = None
            if self.rotary:  # the class at the origin: no rotation
                places = F.pad(axial_positions(rows, columns, x.device), (0, 0, extra, 0))
            inputs = places, cond.text, cond.text_mask
        features = with_long_skips(run, self.blocks, self.skips, x, tau, *inputs, keep=keep)
        features = [x, *features] if keep else features
        if tokens:
            features = [f[:, extra:].unflatten(1, (rows, columns)) for f in features]
        return features[-1], features

    def _enter(self, z: Tensor, tau: Tensor, below: Tensor | None) -> Tensor:
        if self.metadata.image_ratio > 1:
            z = F.avg_pool2d(z, self.metadata.image_ratio)
        # one copy here, or every sum of the residual stream would inherit the channels-first layout
        x = self.patch(z).permute(0, 2, 3, 1).contiguous()
        if not self.rotary:
            x = x + _positions(self.positions, self.metadata.grid, x.shape[1], x.shape[2])
        return x if self.upsample is None or below is None else x + self.upsample(below, tau)


def _checked(text: Text | None, width: int) -> Text | None:
    """The text embeddings, if they have as many channels as the network reads."""
    if text is not None and text.shape[2] != width:
        want = f"of {width} channels" if width else "no text"
        raise UserError(f"this network reads {want}: got text embeddings of shape {tuple(text.shape)}")
    return text


class DiMR(Network):
    """The multi-resolution denoiser.

    `cond.label` where it has classes; `cond.text` and `cond.text_mask` where it reads text (None, or a mask without
    a True, is no text).
    """

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (TransformerBlock, ConvNeXtBlock)
    any_size = True
    config: DiMRConfig

    def __init__(self, config: DiMRConfig):
        super().__init__(config)
        below = (None, *config.stages[:-1])
        self.stages = nn.ModuleList(Stage(s, config, b) for s, b in zip(config.stages, below, strict=True))

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Float[Tensor, "b c h2 w2"]:
        return self._outputs(z, noise_level, cond, last_only=True)[-1]

    def training_outputs(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> tuple[Tensor, ...]:
        """The prediction of every stage, coarse to fine."""
        return self._outputs(z, noise_level, cond, last_only=False)

    def _outputs(self, z: Tensor, noise_level: Tensor, cond: Condition | None, last_only: bool) -> tuple[Tensor, ...]:
        self.check_input(z)
        dtype, label, given = next(self.parameters()).dtype, self.labels(z, cond), Condition() if cond is None else cond
        text = _checked(given.text, self.config.text_width)
        cond = Condition(label, None if text is None else text.to(dtype), given.text_mask)
        z, tau = z.to(dtype), noise_level / 4
        outputs: list[Tensor] = []
        below: Tensor | None = None
        for stage in self.stages:
            assert isinstance(stage, Stage)
            final = stage is self.stages[-1]
            x, features = stage(z, tau, below, cond, self.run, keep=not final)
            if final or not last_only:
                outputs.append(stage.head(x, tau))
            if not final:
                below = torch.cat(features, dim=-1)
                below = below.detach() if self.config.detach_features else below
        return tuple(outputs)

    def fsdp_units(self) -> list[nn.Module]:
        """The blocks, and the large layers between them: fusions of skips, and the way from stage to stage."""
        between = [m for stage in self.stages for m in (*stage.skips, stage.upsample) if m is not None]  # type: ignore
        return [*self.units(), *between]

    def position_tables(self) -> dict[str, tuple[int, int, int]]:
        return {
            f"stages.{i}.positions": (0, *stage.grid)
            for i, stage in enumerate(self.config.stages)
            if stage.kind == "convnext" or self.config.positions == "learned"
        }


# -- sizes


def _config(
    image_size: int,
    channels: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    heads: int,
    ratios: tuple[tuple[int, int], ...],
) -> DiMRConfig:
    """A transformer stage and ConvNeXt stages above it, hidden = 2 width; `ratios` are (image_ratio, patch)."""
    stages = tuple(
        DiMRStage(
            kind="transformer" if i == 0 else "convnext",
            grid=(image_size // (ratio * patch),) * 2,
            width=width,
            hidden=2 * width,
            depth=depth,
            image_ratio=ratio,
            patch=patch,
            heads=heads if i == 0 else 1,
        )
        for i, (width, depth, (ratio, patch)) in enumerate(zip(widths, depths, ratios, strict=True))
    )
    return DiMRConfig(image_size=image_size, in_channels=channels, num_classes=1000, null_class=True, stages=stages)


_TWO, _THREE = ((1, 2), (1, 1)), ((1, 4), (1, 2), (1, 1))

VARIANTS: dict[str, DiMRConfig] = {
    "dimr_xl_256": _config(32, 4, (960, 480), (39, 21), 16, _TWO),
    "dimr_g_256": _config(32, 4, (1152, 576), (57, 29), 16, _TWO),
    "dimr_xl_512": _config(64, 4, (960, 480, 240), (39, 21, 21), 16, _THREE),
    "dimr_m_64": _config(64, 3, (768, 384, 192), (15, 9, 9), 12, _THREE),
    "dimr_l_64": _config(64, 3, (960, 480, 240), (21, 11, 11), 16, _THREE),
}

_COUNTS = "no configuration was released: inferred from the parameter count in the paper (arXiv:2406.09416)"
NOTES = {
    "dimr_xl_512": f"{_COUNTS} and its multiply-adds, which fit exactly; how the factor 4 of the first stage is split "
    "is a guess",
    "dimr_m_64": f"{_COUNTS}; other sizes fit as well",
    "dimr_l_64": f"{_COUNTS}; other sizes fit as well",
}

TINY = DiMRConfig(
    image_size=16,
    in_channels=4,
    num_classes=10,
    stages=(
        DiMRStage("transformer", (8, 8), width=32, hidden=64, depth=3, patch=2, heads=4),
        DiMRStage("convnext", (16, 16), width=16, hidden=32, depth=3),
    ),
)

for _name, _variant in VARIANTS.items():
    register_model(_name, DiMR, _variant, NOTES.get(_name, ""))
