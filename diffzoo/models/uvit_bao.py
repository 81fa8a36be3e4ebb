"""U-ViT of Bao et al.: a transformer on patches with long skips, in which time and condition are tokens.

Paper: "All are Worth Words: A ViT Backbone for Diffusion Models", arXiv:2209.12152. Reference implementation:
github.com/baofff/U-ViT (MIT). This is an independent implementation that loads the official weights
(`diffzoo.zoo.converters.uvit_bao`) and reproduces the official outputs; parameter names are ours.

Not to be confused with the U-ViT of Simple Diffusion (`simple_uvit.py`).

Notable features
- Tokens are [class], time, [text], patches, in this order; one learned position table serves them all. For images of
  another size than it was made for, the positions of the patches are resampled.
- The time token is a plain sinusoid of the number it reads; an MLP on it is an option that no released model uses.
- Long skips: the output of an early block is concatenated to the input of the late one and mixed by a linear layer.
- An optional 3x3 convolution on the assembled image.
- What it reads is 999 t (continuous time) or 1000 t (discrete steps 1..1000): `TimeConditioning`.

Where we differ: attention runs in the working precision instead of float32, and blocks are not recomputed in the
backward pass unless asked.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.base import Network, PatchConfig
from diffzoo.models.registry import register_model
from diffzoo.nn.attention import attend, split_heads
from diffzoo.nn.embeddings import cosine_sine, resample_grid
from diffzoo.nn.norms import STANDARD, check_norm, token_norm
from diffzoo.nn.patches import from_patches
from diffzoo.nn.time_dependent import scaled_level
from diffzoo.nn.vit_layers import Conv2d, Linear, UnitEmbedding, with_long_skips
from diffzoo.typing import Condition, Images, NoiseLevel, Tokens

__all__ = ["TINY", "TINY_TEXT", "VARIANTS", "UViTBao", "UViTBaoConfig"]


# -- config


@dataclass(frozen=True)
class UViTBaoConfig(PatchConfig):
    """The config of a U-ViT.

    Args:
        width: channels.
        depth: blocks, an odd number: some down, one in the middle, as many up.
        heads: attention heads.
        mlp_ratio: hidden over plain width of the MLP.
        qkv_bias: bias in the projection to queries, keys and values.
        mlp_time_embed: an MLP on the time token.
        skip: long skips.
        conv: a 3x3 convolution on the output image.
        text_width, text_tokens: channels and number of the text embeddings; 0 = no text.
        norm: of the blocks: "standard" (layer norm), "td_ln", "td_rmsn", "rmsn" or "ada_rmsn". Time-dependent norms
            read the noise level with 0 at -1 and 1000 at 1; "ada_rmsn" reads the first token, the class or, without
            classes, the time. The norm before the output stays as it is.
    """

    width: int = 512
    depth: int = 13
    heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    skip: bool = True
    conv: bool = True
    text_width: int = 0
    text_tokens: int = 77
    norm: str = STANDARD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm(self.norm)
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}")
        if self.depth % 2 == 0:
            raise UserError(f"the depth is odd (down, middle, up), got {self.depth}")
        if self.num_classes and self.text_width:
            raise UserError("a U-ViT reads classes or text, not both: set num_classes or text_width to 0")

    @property
    def extras(self) -> int:
        """Tokens before the patches."""
        return 1 + (self.num_classes > 0) + (self.text_tokens if self.text_width else 0)


# -- blocks


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, config: UViTBaoConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tokens) -> Tokens:
        return self.out(attend(*split_heads(self.qkv(x), 3, self.heads)))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: UViTBaoConfig):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.hidden = Linear(config.width, hidden)
        self.out = Linear(hidden, config.width)

    def forward(self, x: Tokens) -> Tokens:
        return self.out(F.gelu(self.hidden(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: UViTBaoConfig):
        super().__init__()
        self.attention_norm = token_norm(config.norm, config.width)
        self.attention = Attention(config)
        self.mlp_norm = token_norm(config.norm, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tokens, tau: NoiseLevel | None = None) -> Tokens:
        x = x + self.attention(self.attention_norm(x, tau))
        return x + self.mlp(self.mlp_norm(x, tau))


# -- network


class UViTBao(Network):
    """The U-ViT.

    `cond.label` where it has classes; `cond.text` `(b, text_tokens, text_width)` where it reads text: all tokens are
    read, padding included, so `cond.text_mask` is not used.

    "No text" is the text encoder's embedding of the empty caption, which the network cannot know: give it once with
    `set_null_text`, then `null_condition` returns it. It is not part of the state dict.
    """

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = (Block,)
    any_size = True
    config: UViTBaoConfig
    null_text: Tensor | None

    def __init__(self, config: UViTBaoConfig):
        super().__init__(config)
        c, width = config, config.width
        self.patch = Conv2d(c.in_channels, width, c.patch, stride=c.patch)
        self.time_mlp = None
        if c.mlp_time_embed:
            self.time_mlp = nn.Sequential(Linear(width, 4 * width), nn.SiLU(), Linear(4 * width, width))
        self.class_table = UnitEmbedding(c.class_rows, width) if c.num_classes else None
        self.text_in = Linear(c.text_width, width) if c.text_width else None
        self.positions = nn.Parameter(torch.empty(1, c.extras + math.prod(c.grid), width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.skips = nn.ModuleList(Linear(2 * width, width) for _ in range(c.depth // 2 if c.skip else 0))
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, c.patch**2 * c.in_channels)
        self.smooth = Conv2d(c.in_channels, c.in_channels, 3, padding=1) if c.conv else None
        self.register_buffer("null_text", None, persistent=False)
        if not self.positions.is_meta:
            nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Images:
        self.check_input(z)
        x, tau = self._tokens(z.to(self.positions.dtype), noise_level, cond), scaled_level(noise_level, 0, 1000)
        (x,) = with_long_skips(self.run, self.blocks, self.skips, x, tau)
        tokens = self.head(self.norm(x[:, self.config.extras :]))
        image = from_patches(tokens, z.shape[2] // self.config.patch, self.config.patch)
        return image if self.smooth is None else self.smooth(image)

    def _tokens(self, z: Tensor, noise_level: Tensor, cond: Condition | None) -> Tensor:
        label, text = self.labels(z, cond), self._text(z, cond)
        tokens = [self._time_token(noise_level), self.patch(z).flatten(2).transpose(1, 2)]
        if self.class_table is not None and label is not None:
            tokens.insert(0, self.class_table(label)[:, None])
        if self.text_in is not None and text is not None:
            tokens.insert(1, self.text_in(text.to(z.dtype)))
        grid = z.shape[2] // self.config.patch, z.shape[3] // self.config.patch
        return torch.cat([t.to(tokens[-1].dtype) for t in tokens], dim=1) + self._positions(grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        extras = self.config.extras
        if grid == self.config.grid:
            return self.positions
        return torch.cat(
            [self.positions[:, :extras], resample_grid(self.positions[:, extras:], self.config.grid, grid)], dim=1
        )

    def _time_token(self, noise_level: Tensor) -> Tensor:
        token = cosine_sine(noise_level, self.config.width).to(self.positions.dtype)[:, None]
        return token if self.time_mlp is None else self.time_mlp(token)

    def _text(self, z: Tensor, cond: Condition | None) -> Tensor | None:
        c, text = self.config, cond.text if cond is not None else None
        if text is None and not c.text_width:
            return None
        if not c.text_width:
            raise UserError("this network does not read text: it was given text embeddings; leave them out")
        want = (len(z), c.text_tokens, c.text_width)
        if text is None or tuple(text.shape) != want:
            got = "none" if text is None else str(tuple(text.shape))
            raise UserError(f"this network reads text embeddings of shape {want}, got {got}")
        return text

    def fsdp_units(self) -> list[nn.Module]:
        """The blocks and the fusions of skips between them."""
        return [*self.units(), *self.skips]

    def position_tables(self) -> dict[str, tuple[int, int, int]]:
        return {"positions": (self.config.extras, *self.config.grid)}

    def set_null_text(self, embedding: Float[Tensor, "*b n d"]) -> None:
        """Say what "no text" is: the text encoder's embedding of '', `(text_tokens, text_width)` or with a batch of 1.

        Raises:
            UserError: for a network without text or another shape.
        """
        c = self.config
        want = (c.text_tokens, c.text_width)
        embedding = embedding[0] if embedding.ndim == 3 and len(embedding) == 1 else embedding
        if not c.text_width or tuple(embedding.shape) != want:
            expected = f"an embedding of shape {want}" if c.text_width else "no text at all"
            raise UserError(f"this network reads {expected}, got one of shape {tuple(embedding.shape)}")
        self.null_text = embedding.detach().to(self.positions.device)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        if cond is None or cond.text is None:
            return super().null_condition(cond)
        if self.null_text is None:
            raise UserError(
                "this network's 'no text' is the text encoder's embedding of the empty caption: "
                "give it once with network.set_null_text(embedding)"
            )
        text = self.null_text.to(cond.text.device, cond.text.dtype).expand_as(cond.text)
        mask = torch.ones_like(cond.text_mask) if cond.text_mask is not None else None
        return Condition(text=text, text_mask=mask)


# -- sizes: arXiv:2209.12152, Table 1 and appendix

_S: dict[str, int] = {"width": 512, "depth": 13, "heads": 8}
_M: dict[str, int] = {"width": 768, "depth": 17, "heads": 12}
_L: dict[str, int] = {"width": 1024, "depth": 21, "heads": 16}
_H: dict[str, int] = {"width": 1152, "depth": 29, "heads": 16}


def _pixels(image_size: int, patch: int, classes: int, size: dict[str, int]) -> UViTBaoConfig:
    return UViTBaoConfig(image_size, 3, num_classes=classes, null_class=False, patch=patch, **size)  # type: ignore[arg-type]


def _latents(image_size: int, patch: int, conv: bool, size: dict[str, int]) -> UViTBaoConfig:
    return UViTBaoConfig(image_size, 4, num_classes=1000, patch=patch, conv=conv, **size)  # type: ignore[arg-type]


def _text(size: dict[str, int]) -> UViTBaoConfig:
    return UViTBaoConfig(32, 4, null_class=False, patch=2, text_width=768, text_tokens=77, **size)  # type: ignore[arg-type]


VARIANTS: dict[str, UViTBaoConfig] = {
    "uvit_bao_s_32": _pixels(32, 2, 0, _S),
    "uvit_bao_s_64": _pixels(64, 4, 0, _S),
    "uvit_bao_m_64": _pixels(64, 4, 1000, _M),
    "uvit_bao_l_64": _pixels(64, 4, 1000, _L),
    "uvit_bao_l_256": _latents(32, 2, True, _L),
    "uvit_bao_h_256": _latents(32, 2, False, _H),
    "uvit_bao_l_512": _latents(64, 4, True, _L),
    "uvit_bao_h_512": _latents(64, 4, False, _H),
    "uvit_bao_t2i_s_256": _text(_S),
    "uvit_bao_t2i_s_deep_256": _text({**_S, "depth": 17}),
}

NOTES = {
    "uvit_bao_s_32": "CIFAR-10, unconditional",
    "uvit_bao_s_64": "CelebA, unconditional",
    "uvit_bao_t2i_s_256": "MS-COCO captions, CLIP ViT-L/14 text embeddings",
    "uvit_bao_t2i_s_deep_256": "MS-COCO captions, CLIP ViT-L/14 text embeddings",
}

TINY = UViTBaoConfig(image_size=16, in_channels=4, num_classes=10, width=32, depth=5, heads=4)
TINY_TEXT = TINY.override(num_classes=0, text_width=12, text_tokens=5)

for _name, _variant in VARIANTS.items():
    register_model(_name, UViTBao, _variant, NOTES.get(_name, ""))
