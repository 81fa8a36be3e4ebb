"""Normalisation, and how a network starts at zero."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RMSNorm", "group_norm", "zeroed"]

M = TypeVar("M", bound=nn.Module)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or fewer, of at least four channels, in narrow layers."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, eps=1e-6)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation of the last axis in the input's type.

    Under autocast the input may be narrower than the weight, for which torch leaves its fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def zeroed(layer: M) -> M:
    """The layer with all its parameters set to zero: a block that ends in it starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
