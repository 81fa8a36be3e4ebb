"""The LeGall 5/3 wavelet of JPEG 2000 as an exactly invertible linear transform of images.

Simple Diffusion (arXiv:2301.11093, "option 1" of its input transforms) lets the network work on wavelet responses at a
lower resolution. One level along one axis is two lifting steps (ISO/IEC 15444-1, Annex F, without the rounding of
the reversible path), with whole-sample symmetric extension at the borders:

    (1)  high[n] = odd[n]  - (even[n] + even[n + 1]) / 2
    (2)  low[n]  = even[n] + (high[n - 1] + high[n]) / 4

The inverse undoes (2), then (1). Normalisation: low is multiplied by sqrt(2) and high divided by it, as PyWavelets'
`bior2.2` has it (low pass sums to sqrt(2)). White noise of variance 1 then has variance 1.44 and 0.75 in the two
bands, so that what the network reads stays near unit scale; the paper does not state its normalisation.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffzoo.typing import Maps

__all__ = ["dwt", "idwt"]

ROOT_2 = 2.0**0.5


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level along the last axis, of even length: (low, high), each of half the length."""
    even, odd = x[..., ::2], x[..., 1::2]
    after = torch.cat([even[..., 1:], even[..., -1:]], dim=-1)
    high = odd - (even + after) / 2
    before = torch.cat([high[..., :1], high[..., :-1]], dim=-1)
    low = even + (before + high) / 4
    return low * ROOT_2, high / ROOT_2


def _join(low: Tensor, high: Tensor) -> Tensor:
    """The inverse of `_split`."""
    low, high = low / ROOT_2, high * ROOT_2
    before = torch.cat([high[..., :1], high[..., :-1]], dim=-1)
    even = low - (before + high) / 4
    after = torch.cat([even[..., 1:], even[..., -1:]], dim=-1)
    odd = high + (even + after) / 2
    return torch.stack([even, odd], dim=-1).flatten(-2)


def _bands(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level in two dimensions: the low band (b, c, h/2, w/2) and the three others (b, 3 c, h/2, w/2)."""
    low, high = _split(x)
    (ll, lh), (hl, hh) = (_split(v.mT) for v in (low, high))
    return ll.mT, torch.cat([hl.mT, lh.mT, hh.mT], dim=1)


def _unbands(low: Tensor, others: Tensor) -> Tensor:
    """The inverse of `_bands`."""
    hl, lh, hh = others.chunk(3, dim=1)
    return _join(_join(low.mT, lh.mT).mT, _join(hl.mT, hh.mT).mT)


def dwt(x: Maps, levels: int) -> Float[Tensor, "b c2 h2 w2"]:
    """Wavelet transform of images: `(b, c, h, w)` to `(b, c 4^levels, h / 2^levels, w / 2^levels)`.

    The bands of the finer levels are brought to the coarsest resolution by space-to-depth, so that 3 x 512 x 512
    becomes 48 x 128 x 128 with two levels. Channels: the low band first, then the bands from coarse to fine.
    Height and width must divide by `2^levels`. Computed in float32 at least.
    """
    dtype = x.dtype
    low, finer = x.float() if dtype.itemsize < 4 else x, []
    for level in range(levels):
        low, others = _bands(low)
        finer.append(F.pixel_unshuffle(others, 2 ** (levels - 1 - level)))
    return torch.cat([low, *reversed(finer)], dim=1).to(dtype)


def idwt(y: Maps, levels: int) -> Float[Tensor, "b c2 h2 w2"]:
    """The exact inverse of `dwt`."""
    dtype = y.dtype
    y = y.float() if dtype.itemsize < 4 else y
    channels = y.shape[1] // 4**levels
    low, used = y[:, :channels], channels
    for level in reversed(range(levels)):
        factor = 2 ** (levels - 1 - level)
        count = 3 * channels * factor**2
        low = _unbands(low, F.pixel_shuffle(y[:, used : used + count], factor))
        used += count
    return low.to(dtype)
