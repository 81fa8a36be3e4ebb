"""Convolutional blocks of the Simple Diffusion networks (arXiv:2301.11093, Fig. 8).

The first normalisation of a block is also where a skip of the U-Net enters, by addition instead of concatenation:
(Norm(x) + Norm(skip)) / sqrt(2).
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.nn.embeddings import Film
from diffzoo.nn.norms import STANDARD, map_norm, zeroed
from diffzoo.typing import Maps, NoiseLevel, Vectors

__all__ = ["Downsample", "ResBlock", "Upsample"]

HALF_ROOT = 0.5**0.5


class ResBlock(nn.Module):
    """Pre-normalised residual block of two 3x3 convolutions, with FiLM between them.

    norm -> (fuse skip) -> SiLU -> conv -> norm -> scale and shift -> SiLU -> dropout -> conv (starts at zero) -> + x

    Args:
        channels: width in and out.
        embedding: width of the conditioning vector.
        dropout: probability before the second convolution; 0 = no dropout layer.
        skip: whether `forward` is given a skip of the same shape as x.
        norm: of x, the skip and between the convolutions, as `map_norm` has it; group norm by default.
    """

    def __init__(self, channels: int, embedding: int, dropout: float = 0.0, skip: bool = False, norm: str = STANDARD):
        super().__init__()
        self.norm1 = map_norm(norm, channels)
        self.norm_skip = map_norm(norm, channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = map_norm(norm, channels)
        self.film = Film(embedding, channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Maps, emb: Vectors, skip: Maps | None = None, tau: NoiseLevel | None = None) -> Maps:
        """Features `(b, c, h, w)`, conditioning `(b, e)`, a skip of x's shape where the block has one.

        `tau` `(b,)`, the noise level in about [-1, 1], is for time-dependent norms.
        """
        h = self.norm1(x, tau)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip, tau)) * HALF_ROOT
        h = self.norm2(self.conv1(F.silu(h)), tau)
        scale, shift = self.film(emb)
        h = h * scale[:, :, None, None] + shift[:, :, None, None]
        return x + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Average pooling by 2, then a 1x1 projection to the next width: `(b, c, h, w)` to `(b, c', h/2, w/2)`."""

    def __init__(self, channels: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels_out, 1)

    def forward(self, x: Maps) -> Float[Tensor, "b c2 h2 w2"]:
        return self.conv(F.avg_pool2d(x, 2))


class Upsample(nn.Module):
    """A 1x1 projection to the next width, then nearest-neighbour by 2: `(b, c, h, w)` to `(b, c', 2h, 2w)`."""

    def __init__(self, channels: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels_out, 1)

    def forward(self, x: Maps) -> Float[Tensor, "b c2 h2 w2"]:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")
