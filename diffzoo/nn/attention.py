"""Attention and the transformer block of the U-ViTs.

Queries and keys are normalised per head (RMS, with a learned scale), which bounds the logits; the products go through
`scaled_dot_product_attention`. Tokens are `(b, n, c)`.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.errors import UserError
from diffzoo.nn.convs import HALF_ROOT
from diffzoo.nn.embeddings import Film
from diffzoo.nn.norms import STANDARD, RMSNorm, map_norm, token_norm, zeroed
from diffzoo.typing import Maps, NoiseLevel, Tokens, Vectors

__all__ = [
    "CrossAttention",
    "FilmMLP",
    "ImageAttention",
    "SelfAttention",
    "TransformerBlock",
    "attend",
    "split_heads",
    "to_image",
    "to_tokens",
]

Context = Float[Tensor, "b m d2"]
Visible = Bool[Tensor, "b m"]
Heads = Float[Tensor, "b heads n c"]
AttentionMask = Bool[Tensor, "b 1 1 m"]


def to_tokens(x: Maps) -> Tokens:
    """`(b, c, h, w)` to `(b, h w, c)`; free of copies in the channels-last layout."""
    return x.flatten(2).mT


def to_image(x: Tokens, height: int) -> Maps:
    """The inverse of `to_tokens`, for feature maps of the given height."""
    return x.mT.unflatten(2, (height, -1))


def split_heads(x: Tokens, parts: int, heads: int) -> tuple[Heads, ...]:
    """`(b, n, parts heads c)` to `parts` tensors `(b, heads, n, c)`, such as queries, keys and values."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    q: Heads, k: Float[Tensor, "b heads m c"], v: Float[Tensor, "b heads m c"], mask: AttentionMask | None = None
) -> Tokens:
    """Scaled dot-product attention with the heads joined again, `(b, n, heads c)`; `mask` is True for visible keys."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _check_heads(channels: int, heads: int) -> None:
    if channels % heads:
        raise UserError(f"a width of {channels} channels does not divide into {heads} attention heads")


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens; the output projection starts at zero.

    Args:
        channels: width; must divide by `heads`.
        heads: attention heads.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        _check_heads(channels, heads)
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = RMSNorm(channels // heads, eps=1e-6)
        self.norm_k = RMSNorm(channels // heads, eps=1e-6)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tokens) -> Tokens:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)
        return self.out(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens to context tokens; the output projection starts at zero.

    Args:
        channels: width of the image tokens; must divide by `heads`.
        context: width of the context tokens.
        heads: attention heads.
    """

    def __init__(self, channels: int, context: int, heads: int):
        super().__init__()
        _check_heads(channels, heads)
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(context, 2 * channels)
        self.norm_q = RMSNorm(channels // heads, eps=1e-6)
        self.norm_k = RMSNorm(channels // heads, eps=1e-6)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tokens, context: Context, visible: Visible) -> Tokens:
        """Tokens `(b, n, c)`, context `(b, m, c')`, and which context tokens may be seen, `(b, m)`."""
        q = self.q(x).unflatten(2, (self.heads, -1))
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)
        return self.out(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible[:, None, None]))


class ImageAttention(nn.Module):
    """Residual self-attention on feature maps `(b, c, h, w)`: the attention of the U-Net.

    Args:
        channels: width; must divide by `heads`.
        heads: attention heads.
        norm: of the maps, as `map_norm` has it; queries and keys have their own.
    """

    def __init__(self, channels: int, heads: int, norm: str = STANDARD):
        super().__init__()
        self.norm = map_norm(norm, channels)
        self.attention = SelfAttention(channels, heads)

    def forward(self, x: Maps, tau: NoiseLevel | None = None) -> Maps:
        return x + to_image(self.attention(to_tokens(self.norm(x, tau))), x.shape[2])


class FilmMLP(nn.Module):
    """Two linear layers with FiLM on the hidden one: linear -> SiLU -> scale and shift -> dropout -> linear (zero).

    That FiLM acts on the hidden layer follows from the published parameter counts: with it the residual U-ViT has
    397.6 M parameters (stated: 397 M), without 234 M.
    """

    def __init__(self, channels: int, embedding: int, ratio: int = 4, dropout: float = 0.0):
        super().__init__()
        self.linear1 = nn.Linear(channels, ratio * channels)
        self.film = Film(embedding, ratio * channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear2 = zeroed(nn.Linear(ratio * channels, channels))

    def forward(self, x: Tokens, emb: Vectors) -> Tokens:
        scale, shift = self.film(emb)
        h = F.silu(self.linear1(x)) * scale[:, None] + shift[:, None]
        return self.linear2(self.dropout(h))


class TransformerBlock(nn.Module):
    """Pre-normalised transformer block in the order of Simple Diffusion: MLP, self-attention, then cross-attention.

    Args:
        channels: width.
        embedding: width of the conditioning vector.
        heads: attention heads.
        dropout: probability in the MLP's hidden layer and on the output of self-attention; 0 = no dropout layers.
        skip: whether a skip of x's shape is fused into the first normalisation, as in `ResBlock`.
        context: width of the caption tokens; 0 = no cross-attention.
        norm: of the tokens and the skip, as `token_norm` has it; queries and keys have their own.
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        heads: int,
        dropout: float = 0.0,
        skip: bool = False,
        context: int = 0,
        norm: str = STANDARD,
    ):
        super().__init__()
        self.norm1 = token_norm(norm, channels)
        self.norm_skip = token_norm(norm, channels) if skip else None
        self.mlp = FilmMLP(channels, embedding, dropout=dropout)
        self.norm2 = token_norm(norm, channels)
        self.attention = SelfAttention(channels, heads)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.norm3 = token_norm(norm, channels) if context else None
        self.cross = CrossAttention(channels, context, heads) if context else None

    def forward(
        self,
        x: Tokens,
        emb: Vectors,
        skip: Tokens | None = None,
        context: Context | None = None,
        visible: Visible | None = None,
        tau: NoiseLevel | None = None,
    ) -> Tokens:
        """Tokens `(b, n, c)`, conditioning `(b, e)`, a skip of x's shape, caption tokens and which are visible.

        `tau` `(b,)`, the noise level in about [-1, 1], is for time-dependent norms.
        """
        h = self.norm1(x, tau)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip, tau)) * HALF_ROOT
        x = x + self.mlp(h, emb)
        x = x + self.dropout(self.attention(self.norm2(x, tau)))
        if self.cross is not None and self.norm3 is not None:
            x = x + self.cross(self.norm3(x, tau), context, visible)
        return x
