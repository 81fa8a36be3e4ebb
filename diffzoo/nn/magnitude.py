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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.typing import Labels, Maps, NoiseLevel, Vectors

__all__ = ["Fourier", "MPConv2d", "MPLinear", "MPTable", "join", "mix", "normalize", "silu"]

EPS = 1e-4


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    """The numbers along `dims`; a loop, since `math.prod` of a generator would end a compiled graph."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count


def _rms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The root mean square along `dims`, which stay as 1; in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide) / math.sqrt(_count(x, dims))


def normalize(x: Float[Tensor, "*shape"], dims: tuple[int, ...] | None = None) -> Float[Tensor, "*shape"]:
    """x over its root mean square along `dims`, in float32; without dims over all but the first."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (_rms(x, dims or tuple(range(1, x.ndim))) + EPS)).to(x.dtype)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """SiLU that keeps the variance of normal inputs."""
    return F.silu(x) / 0.596


def mix(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """A share 1 - t of `a` and t of `b`, which keeps the variance of independent ones."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def join(a: Maps, b: Float[Tensor, "b c2 h w"], t: float) -> Float[Tensor, "b c3 h w"]:
    """`a` and `b` along the channels; `a` has a share 1 - t of what is read from them."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(na) * a, scale * t / math.sqrt(nb) * b], dim=1)


class _Scaled(torch.autograd.Function):
    """scale w / (rms + eps) with a given rms of w along `dims`, whose gradient reads w once: weights are many."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, rms: Tensor, dims: tuple[int, ...], scale: float) -> Tensor:
        ctx.save_for_backward(w, rms)
        ctx.dims, ctx.scale = dims, scale
        return w * (scale / (rms + EPS))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (g,), (w, rms) = grads, ctx.saved_tensors
        count = _count(w, ctx.dims)
        along = torch.sum(g * w, ctx.dims, keepdim=True)
        factor = ctx.scale / (rms + EPS)
        return (g * factor).addcmul_(w, -along * factor / ((rms + EPS) * rms * count)), None, None, None


def _unit(layer: "MPLinear | MPConv2d | MPTable", dims: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """The weight normalised along `dims` and scaled, float32; in training what is stored is overwritten first."""
    weight = layer.weight
    rms = _rms(weight.detach(), dims)
    if layer.training:
        with torch.no_grad():
            weight.div_(rms + EPS)
        rms = rms / (rms + EPS)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scaled: Tensor = _Scaled.apply(wide, rms, dims, scale)
    return scaled


def _weight(layer: "MPLinear | MPConv2d", x: Tensor, gain: Tensor | None) -> Tensor:
    """The weight to use: of unit length per output after the gain, in the type of x."""
    weight = layer.weight
    unit = _unit(layer, tuple(range(1, weight.ndim)), 1 / math.sqrt(weight[0].numel()))
    return (unit if gain is None else unit * gain).to(x.dtype)


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows have unit length."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, x: Float[Tensor, "*b d"], gain: Float[Tensor, ""] | None = None) -> Float[Tensor, "*b e"]:
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

    def forward(self, label: Labels) -> Vectors:
        return F.pad(_unit(self, (0,)).to(self.weight.dtype), (0, 0, 0, 1))[label]


class MPConv2d(nn.Conv2d):
    """A convolution without bias that keeps the size, whose kernels have unit length per output channel."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, x: Maps, gain: Float[Tensor, ""] | None = None) -> Float[Tensor, "b c2 h w"]:
        return F.conv2d(x, _weight(self, x, gain), padding=self.padding)


class Fourier(nn.Module):
    """A number to random features of unit variance: sqrt(2) cos(2 pi (f x + p)); frequencies and phases are fixed."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.frequencies: Tensor
        self.phases: Tensor

    def forward(self, x: NoiseLevel) -> Vectors:
        """`(b,)` to `(b, width)`, float32."""
        return math.sqrt(2) * torch.cos(torch.outer(x.float(), self.frequencies.float()) + self.phases.float())
