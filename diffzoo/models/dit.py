"""Transformers with adaptive layer norm that starts at zero (adaLN-Zero): DiT, SiT, JiT, LightningDiT, RAE's DiT-DH.

Papers: DiT, arXiv:2212.09748; SiT, arXiv:2401.08740 (REPA, arXiv:2410.06940, trains the same network); LightningDiT,
arXiv:2501.01423; DiT-DH, arXiv:2510.11690; JiT, arXiv:2511.13720. An independent implementation that loads the official
weights (`diffzoo.zoo.converters.dit`) and reproduces the official outputs; parameter names are ours.

Notable features
- One block: x + gate * f(norm(x) * (1 + scale) + shift), attention first, then the MLP; shift, scale and gate are
  linear in the SiLU of the condition, time plus class, and start at zero.
- Positions are a fixed table of sines and cosines, column first; newer members turn queries and keys as well (RoPE),
  the first half of a head by the row, the second by the column. Both are computed, so another image size needs no
  surgery.
- JiT works on pixels: a bottleneck after the patches, and class tokens that join from one block on.
- DiT-DH: the tokens of a deep, narrow transformer condition a shallow, wide one, token by token.
- What the network reads (a step index, or t from the noise or from the data) and says is a fact of the weights.

Where we differ: attention is a fused kernel; position tables are not part of the state; DiT-DH starts like the others
(the official code keeps PyTorch's first weights); dropout sits in the middle half of the blocks for every member.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.base import Network, PatchConfig
from diffzoo.models.registry import register_variants
from diffzoo.nn.attention import attend, split_heads
from diffzoo.nn.axial_rope import grid_angles, rotate_pairs
from diffzoo.nn.embeddings import cosine_sine, sine_cosine_table
from diffzoo.nn.norms import RMSNorm
from diffzoo.nn.patches import from_patches
from diffzoo.nn.vit_layers import Conv2d, Embedding, XavierLinear
from diffzoo.typing import Condition, Images, NoiseLevel, Output, Tokens, Vectors

__all__ = ["TINY", "TINY_HEAD", "TINY_JIT", "VARIANTS", "DiT", "DiTConfig"]

TIME_FEATURES = 256
EPS = 1e-6
Turn = tuple[Tensor, Tensor]  # cosines and sines of RoPE, `(n, d / 2)` each
Given = Float[Tensor, "b #n d"]  # one vector for all tokens, or one each


# -- config


@dataclass(frozen=True)
class DiTConfig(PatchConfig):
    """The facts of an adaLN-Zero transformer.

    Args:
        width, depth, heads: of the blocks.
        mlp_ratio: hidden over plain width of the MLP; a gated MLP has two thirds of it, which costs the same.
        norm: "layer" (without parameters) or "rms" (with a scale).
        mlp: "gelu" or "swiglu" (gated).
        rope: turn queries and keys by their position.
        qk_norm: normalise queries and keys per head.
        shift: the modulation shifts; else it scales and gates only.
        bottleneck: channels between patches and tokens; 0 = none.
        context_tokens, context_start: class tokens that join before block `context_start`, counted from 0; 0 tokens =
            none.
        head_width, head_depth, head_heads: of the wide head of DiT-DH; depth 0 = no head.
        time_features: "sinusoid", or "gaussian" for random frequencies that are part of the weights.
        learned_variance: twice the output channels.
        spare_outputs: the weights have twice the output channels and the second half is dropped, as in SiT.
        projector_width, projector_depth, projector_hidden: channels of the features that an MLP on the tokens after so
            many blocks is aligned with in training (`DiT.aligned`); width 0 = none.
        dropout: probability on the output of attention and inside the MLP, in the middle half of the blocks.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    rope: bool = False
    qk_norm: bool = False
    shift: bool = True
    bottleneck: int = 0
    context_tokens: int = 0
    context_start: int = 0
    head_width: int = 0
    head_depth: int = 0
    head_heads: int = 16
    time_features: Literal["sinusoid", "gaussian"] = "sinusoid"
    learned_variance: bool = False
    spare_outputs: bool = False
    projector_width: int = 0
    projector_depth: int = 8
    projector_hidden: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, heads in ((self.width, self.heads), (self.head_width, self.head_heads)):
            if width % heads or (self.rope and width // heads % 4):
                step = 4 if self.rope else 1
                raise UserError(f"{heads} heads do not divide the width {width} into multiples of {step}")
        if self.width % 4:
            raise UserError(f"the position table needs a width that divides by 4, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}")

    def summary_rows(self) -> list[dict[str, object]]:
        """For `diffzoo describe`: the transformer, and the head if there is one."""
        tokens = math.prod(self.grid)
        body = {"part": "blocks", "tokens": tokens, "width": self.width, "depth": self.depth, "heads": self.heads}
        head = {"part": "head", "tokens": tokens, "width": self.head_width, "depth": self.head_depth}
        return [body, {**head, "heads": self.head_heads}] if self.head_depth else [body]


# -- parts


class PatchEmbedding(nn.Module):
    """Images `(b, c, h, w)` to tokens `(b, n, d)`, through a bottleneck or not."""

    def __init__(self, config: DiTConfig, width: int, bottleneck: int = 0):
        super().__init__()
        inner = bottleneck or width
        self.conv = Conv2d(config.in_channels, inner, config.patch, stride=config.patch, bias=not bottleneck)
        self.project = Conv2d(bottleneck, width, 1) if bottleneck else None
        for layer in (self.conv, self.project):
            if layer is not None and not layer.weight.is_meta:
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Images) -> Tokens:
        x = self.conv(x)
        return (x if self.project is None else self.project(x)).flatten(2).mT


class TimeEmbedding(nn.Module):
    """A number to a vector `(b, d)`: cosines and sines of it, two linear layers.

    Args:
        width: d.
        features: "sinusoid" or "gaussian", see `DiTConfig`.
        period: sinusoids have frequencies from 1 to 1 / period.
    """

    frequencies: Tensor | None

    def __init__(self, width: int, features: str, period: float = 10_000.0):
        super().__init__()
        self.period = period
        gaussian = features == "gaussian"
        self.register_buffer("frequencies", torch.randn(TIME_FEATURES) if gaussian else None)
        self.linear1 = XavierLinear(2 * TIME_FEATURES if gaussian else TIME_FEATURES, width, std=0.02)
        self.linear2 = XavierLinear(width, width, std=0.02)

    def forward(self, noise_level: NoiseLevel) -> Vectors:
        if self.frequencies is None:
            waves = cosine_sine(noise_level, TIME_FEATURES, self.period)
        else:
            angles = 2 * math.pi * (noise_level.float()[:, None] * self.frequencies.float())
            waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.linear2(F.silu(self.linear1(waves.to(self.linear1.weight.dtype))))


class Modulation(nn.Module):
    """The condition `(b, 1 or n, d)` to `parts` vectors of the same form; starts at zero."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = XavierLinear(width, parts * width, zero=True)

    def forward(self, cond: Given) -> tuple[Given, ...]:
        return self.linear(F.silu(cond)).chunk(self.parts, dim=-1)


def _norm(kind: str, width: int) -> nn.Module:
    return RMSNorm(width, eps=EPS) if kind == "rms" else nn.LayerNorm(width, eps=EPS, elementwise_affine=False)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, config: DiTConfig, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, d = heads, width // heads
        self.qkv = XavierLinear(width, 3 * width)
        rms = config.norm == "rms"
        self.norm_q, self.norm_k = (
            nn.Identity() if not config.qk_norm else RMSNorm(d, eps=EPS) if rms else nn.LayerNorm(d) for _ in range(2)
        )
        self.out = XavierLinear(width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tokens, turn: Turn | None) -> Tokens:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate_pairs(q, *turn), rotate_pairs(k, *turn)
        return self.dropout(self.out(attend(q, k, v)))


class MLP(nn.Module):
    """GELU (tanh form) between two linear layers, or SiLU of one half times the other half."""

    def __init__(self, config: DiTConfig, width: int, dropout: float):
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.gated = config.mlp == "swiglu"
        inner = int(hidden * 2 / 3) if self.gated else hidden
        self.hidden = XavierLinear(width, 2 * inner if self.gated else inner)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.out = XavierLinear(inner, width)

    def forward(self, x: Tokens) -> Tokens:
        h = self.hidden(x)
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            return self.out(self.dropout(F.silu(gate) * value))
        return self.out(self.dropout(F.gelu(h, approximate="tanh")))


class Block(nn.Module):
    """Attention and MLP, each modulated by the condition."""

    def __init__(self, config: DiTConfig, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = _norm(config.norm, width), _norm(config.norm, width)
        self.attention = Attention(config, width, heads, dropout)
        self.mlp = MLP(config, width, dropout)
        self.shift = config.shift
        self.modulation = Modulation(width, 6 if config.shift else 4)

    def forward(self, x: Tokens, cond: Given, turn: Turn | None) -> Tokens:
        """Tokens `(b, n, d)`, the condition `(b, 1 or n, d)`, and how RoPE turns; the tokens."""
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)
            x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), turn)
            return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        scale1, gate1, scale2, gate2 = self.modulation(cond)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1), turn)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


# -- network


class DiT(Network):
    """The transformer. `cond.label` where it has classes."""

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (Block,)
    any_size = True
    config: DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        c = config
        self.embed = PatchEmbedding(c, c.width, c.bottleneck)
        self.time = TimeEmbedding(c.width, c.time_features)
        self.classes = Embedding(c.class_rows, c.width) if c.num_classes else None
        middle = range(c.depth // 4, c.depth // 4 * 3)
        self.blocks = nn.ModuleList(
            Block(c, c.width, c.heads, c.dropout if i in middle else 0.0) for i in range(c.depth)
        )
        self.context = nn.Parameter(torch.empty(1, c.context_tokens, c.width)) if c.context_tokens else None
        if self.context is not None and not self.context.is_meta:
            nn.init.normal_(self.context, std=0.02)
        last = c.width
        if c.head_depth:
            last = c.head_width
            self.head_embed = PatchEmbedding(c, last)
            self.head_project = XavierLinear(c.width, last) if last != c.width else nn.Identity()
        self.head = nn.ModuleList(Block(c, last, c.head_heads) for _ in range(c.head_depth))
        self.norm_out = _norm(c.norm, last)
        self.modulation_out = Modulation(last, 2)
        channels = c.in_channels * (2 if c.learned_variance or c.spare_outputs else 1)
        self.out = XavierLinear(last, c.patch**2 * channels, zero=True)
        self.projector = _projector(c) if c.projector_width else None

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Output:
        return self._forward(z, noise_level, cond)[0]

    def aligned(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> tuple[Output, Tokens]:
        """The output, and the projected tokens `(b, n, projector_width)` that REPA compares with an encoder's.

        Raises:
            UserError: without a projector.
        """
        if self.projector is None:
            raise UserError("this network has no projector: set projector_width to the width of the encoder's features")
        output, tokens = self._forward(z, noise_level, cond)
        return output, self.projector(tokens)

    def _forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None) -> tuple[Output, Tokens]:
        """The output, and the tokens after block `projector_depth`."""
        self.check_input(z)
        c, label = self.config, self.labels(z, cond)
        z = z.to(self.out.weight.dtype)
        time = self.time(noise_level)
        given = None if label is None or self.classes is None else self.classes(label)
        vector = (time if given is None else time + given)[:, None]
        if c.head_depth:
            vector = F.silu(vector)
        x = self.embed(z)
        grid = z.shape[2] // c.patch, z.shape[3] // c.patch
        x = x + sine_cosine_table(*grid, c.width, x.device).to(x.dtype)
        tokens = x
        for i, (block, turn) in enumerate(zip(self.blocks, self._turns(x, grid), strict=True)):
            if self.context is not None and i == c.context_start:
                x = torch.cat([self._context(given, len(x)), x], dim=1)
            x = self.run(block, x, vector, turn)
            tokens = x if i + 1 == c.projector_depth else tokens
        if self.context is not None:
            x = x[:, c.context_tokens :]
        if c.head_depth:
            x, vector = self._wide(z, F.silu(time[:, None] + x), grid)
        shift, scale = self.modulation_out(vector)
        output = self.out(torch.addcmul(shift, self.norm_out(x), 1 + scale))
        image = from_patches(output, grid[0], c.patch)
        return image[:, : c.in_channels] if c.spare_outputs else image, tokens

    def _context(self, given: Tensor | None, batch: int) -> Tokens:
        """The class tokens: the class itself (not the time) at learned positions."""
        assert self.context is not None
        tokens = self.context.expand(batch, -1, -1)
        return tokens if given is None else tokens + given[:, None]

    def _wide(
        self, z: Images, s: Tokens, grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b n e"]]:
        """The tokens of the wide head, and the tokens of the deep part that condition it."""
        s, x = self.head_project(s), self.head_embed(z)
        turn = self._turn(self.config.head_width // self.config.head_heads, x, grid)
        for block in self.head:
            x = self.run(block, x, s, turn)
        return x, s

    def _turn(self, d: int, x: Tokens, grid: tuple[int, int]) -> Turn | None:
        if not self.config.rope:
            return None
        angles = grid_angles(*grid, d, x.device)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _turns(self, x: Tokens, grid: tuple[int, int]) -> Iterator[Turn | None]:
        """RoPE of each block; class tokens, where they have joined, do not turn."""
        c = self.config
        plain = self._turn(c.width // c.heads, x, grid)
        joined = plain
        if plain is not None and c.context_tokens:
            joined = (
                F.pad(plain[0], (0, 0, c.context_tokens, 0), value=1.0),
                F.pad(plain[1], (0, 0, c.context_tokens, 0)),
            )
        yield from (joined if i >= c.context_start else plain for i in range(c.depth))


def _projector(config: DiTConfig) -> nn.Sequential:
    hidden = config.projector_hidden
    return nn.Sequential(
        XavierLinear(config.width, hidden),
        nn.SiLU(),
        XavierLinear(hidden, hidden),
        nn.SiLU(),
        XavierLinear(hidden, config.projector_width),
    )


# -- sizes

_S: dict[str, int] = {"width": 384, "depth": 12, "heads": 6}
_B: dict[str, int] = {"width": 768, "depth": 12, "heads": 12}
_L: dict[str, int] = {"width": 1024, "depth": 24, "heads": 16}
_XL: dict[str, int] = {"width": 1152, "depth": 28, "heads": 16}
_H: dict[str, int] = {"width": 1280, "depth": 32, "heads": 16}


def _dit(size: dict[str, int], image_size: int = 32, channels: int = 4, **options: Any) -> DiTConfig:
    return DiTConfig(image_size, channels, num_classes=1000, **{**size, **options})


def _modern(image_size: int, channels: int, size: dict[str, int], **options: Any) -> DiTConfig:
    """RMS norm, gated MLP and RoPE: what LightningDiT, DiT-DH and JiT share."""
    parts: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "rope": True, **size, **options}
    return DiTConfig(image_size, channels, num_classes=1000, **parts)


def _jit(size: dict[str, int], image_size: int, start: int, bottleneck: int = 128, **options: Any) -> DiTConfig:
    return _modern(
        image_size,
        3,
        size,
        patch=image_size // 16,
        qk_norm=True,
        bottleneck=bottleneck,
        context_tokens=32,
        context_start=start,
        **options,
    )


def _dh(size: dict[str, int], image_size: int) -> DiTConfig:
    return _modern(image_size, 768, size, patch=1, head_width=2048, head_depth=2, time_features="gaussian")


VARIANTS: dict[str, DiTConfig] = {
    **{f"dit_{k}_256": _dit(v, learned_variance=True) for k, v in (("s", _S), ("b", _B), ("l", _L), ("xl", _XL))},
    "dit_xl_512": _dit(_XL, 64, learned_variance=True),
    **{f"sit_{k}_256": _dit(v, spare_outputs=True) for k, v in (("s", _S), ("b", _B), ("l", _L), ("xl", _XL))},
    "sit_xl_512": _dit(_XL, 64),
    **{f"repa_{k}_256": _dit(v) for k, v in (("b", _B), ("xl", _XL))},
    "repa_e_xl_256": _dit(_XL, 16, 32, patch=1),
    "jit_b_64": _jit(_B, 64, 4),
    "jit_b_256": _jit(_B, 256, 4),
    "jit_l_256": _jit(_L, 256, 8),
    "jit_h_256": _jit(_H, 256, 10, 256, dropout=0.2),
    "jit_b_512": _jit(_B, 512, 4),
    "jit_l_512": _jit(_L, 512, 8),
    "jit_h_512": _jit(_H, 512, 10, 256, dropout=0.2),
    "lightningdit_b_256": _modern(16, 32, _B, patch=1),
    "lightningdit_xl_256": _modern(16, 32, _XL, patch=1),
    "dit_dh_s_256": _dh(_S, 16),
    "dit_dh_s_512": _dh(_S, 32),
    "dit_dh_xl_256": _dh(_XL, 16),
    "dit_dh_xl_512": _dh(_XL, 32),
}

TINY = DiTConfig(16, 4, num_classes=10, width=32, depth=4, heads=4)
TINY_JIT = DiTConfig(
    16, 3, num_classes=10, patch=4, width=32, depth=4, heads=2, norm="rms", mlp="swiglu", rope=True, qk_norm=True,
    bottleneck=8, context_tokens=3, context_start=1,
)  # fmt: skip
TINY_HEAD = DiTConfig(
    8, 6, num_classes=10, patch=1, width=32, depth=2, heads=2, norm="rms", mlp="swiglu", rope=True,
    head_width=48, head_depth=1, head_heads=2, time_features="gaussian",
)  # fmt: skip

register_variants(DiT, VARIANTS)
