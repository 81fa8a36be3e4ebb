"""Layers that preserve magnitudes (EDM2, arXiv:2312.02696): unit variance in, unit variance out, by construction.

    normalize(x)    x / (rms(x) + 1e-4)                                              Eq. 47
    silu(x)         silu(x) / 0.596                                                  Eq. 81
    mix(a, b, t)    ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                        Eq. 88
    join(a, b, t)   a and b side by side, weighed so that each contributes its t     Eq. 103

A weight is stored raw and normalised in every forward pass, per output channel. In training the stored weight itself is
overwritten by its normalised self first ("forced" normalisation, section 2.3), so its length cannot drift. Adding to a
weight (LoRA, say) is meant to happen before the normalisation.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.typing import Images, NoiseLevel

__all__ = ["Fourier", "MPConv2d", "MPLinear", "MPTable", "join", "mix", "normalize", "silu"]

EPS = 1e-4


def normalize(x: Float[Tensor, "*shape"], dims: tuple[int, ...] | None = None) -> Float[Tensor, "*shape"]:
    """x over its root mean square along `dims`, in float32; without dims over all but the first."""
    dims = dims or tuple(range(1, x.ndim))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = wide.square().mean(dims, keepdim=True).sqrt()
    return (wide / (length + EPS)).to(x.dtype)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """SiLU that keeps the variance of normal inputs."""
    return F.silu(x) / 0.596


def mix(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """A share 1 - t of `a` and t of `b`, which keeps the variance of independent ones."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def join(a: Images, b: Float[Tensor, "b c2 h w"], t: float) -> Float[Tensor, "b c3 h w"]:
    """`a` and `b` along the channels; `a` has a share 1 - t of what is read from them."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(na) * a, scale * t / math.sqrt(nb) * b], dim=1)


def _unit(layer: "MPLinear | MPConv2d | MPTable", dims: tuple[int, ...] | None = None) -> Tensor:
    """The weight normalised along `dims`, float32; in training what is stored is overwritten first."""
    if layer.training:
        with torch.no_grad():
            layer.weight.copy_(normalize(layer.weight, dims))
    return normalize(layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32)), dims)


def _weight(layer: "MPLinear | MPConv2d", x: Tensor, gain: Tensor | float) -> Tensor:
    """The weight to use: of unit length per output after the gain, in the type of x."""
    weight = _unit(layer)
    return (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows have unit length."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.linear(x, _weight(self, x, gain))


class MPTable(nn.Module):
    """A vector per class, `(classes, channels)`: every channel has unit variance over the classes.

    It is what a linear layer makes of one-hot vectors of variance one. The index behind the last class gives zeros.
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, channels))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, label: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        return F.pad(_unit(self, (0,)).to(self.weight.dtype), (0, 0, 0, 1))[label]


class MPConv2d(nn.Conv2d):
    """A convolution without bias that keeps the size, whose kernels have unit length per output channel."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, x: Images, gain: Tensor | float = 1.0) -> Images:
        return F.conv2d(x, _weight(self, x, gain), padding=self.padding)


class Fourier(nn.Module):
    """A number to random features of unit variance: sqrt(2) cos(2 pi (f x + p)); frequencies and phases are fixed."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.frequencies: Tensor
        self.phases: Tensor

    def forward(self, x: NoiseLevel) -> Float[Tensor, "b d"]:
        """`(b,)` to `(b, width)`, float32."""
        return math.sqrt(2) * torch.cos(torch.outer(x.float(), self.frequencies.float()) + self.phases.float())
