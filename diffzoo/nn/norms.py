"""Normalisation, and how a network starts at zero.

The config of a family names the norm of its blocks: `STANDARD`, what the family's authors use, or one of
`diffzoo.nn.time_dependent.NORMS`. `token_norm` and `map_norm` build it; all are called as `norm(x, tau)`.
"""

from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.errors import UserError, nearest
from diffzoo.nn.time_dependent import NORMS, build_norm
from diffzoo.typing import Maps, NoiseLevel

__all__ = ["STANDARD", "GroupNorm", "LayerNorm", "MapNorm", "RMSNorm", "check_norm", "group_norm", "map_norm",
           "token_norm", "zeroed"]  # fmt: skip

STANDARD = "standard"
Shaped = Float[Tensor, "b *shape"]

M = TypeVar("M", bound=nn.Module)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of `(b, c, ...)`; `tau` is ignored."""

    def forward(self, x: Shaped, tau: NoiseLevel | None = None) -> Shaped:
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of the last axis; `tau` is ignored."""

    def forward(self, x: Shaped, tau: NoiseLevel | None = None) -> Shaped:
        return super().forward(x)


class MapNorm(nn.Module):
    """A norm of `NORMS` on feature maps `(b, c, h, w)`: over the channels, at each position by itself.

    Args:
        norm: for channels last.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Maps, tau: NoiseLevel | None) -> Maps:
        # a view both ways, and of maps in the channels-last layout a contiguous one
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1), tau)
        return normed.permute(0, 3, 1, 2)


def group_norm(channels: int) -> GroupNorm:
    """Group normalisation with 32 groups, or fewer, of at least four channels, in narrow layers."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return GroupNorm(groups, channels, eps=1e-6)


def token_norm(name: str, channels: int) -> nn.Module:
    """The norm of tokens `(b, n, c)`: layer norm if `name` is `STANDARD`, else that of `NORMS`."""
    return LayerNorm(channels) if name == STANDARD else build_norm(name, channels)


def map_norm(name: str, channels: int, standard: Callable[[int], nn.Module] = group_norm) -> nn.Module:
    """The norm of feature maps `(b, c, h, w)`: what `standard` makes if `name` is `STANDARD`, else that of `NORMS`."""
    return standard(channels) if name == STANDARD else MapNorm(build_norm(name, channels))


def check_norm(name: str, first_token: bool = True) -> None:
    """Raise unless `name` is a norm that a family with a standard one offers.

    Args:
        name: what the config says.
        first_token: whether the first token of the family carries the class or the noise level, which "ada_rmsn" reads.

    Raises:
        UserError: naming the norms that are offered, and why "ada_rmsn" is not.
    """
    offered = [STANDARD, *(n for n in NORMS if first_token or n != "ada_rmsn")]
    if name in offered:
        return
    lacking = " ('ada_rmsn' reads a class or time token, which this family lacks)"
    why = lacking if name == "ada_rmsn" else nearest(name, offered)
    raise UserError(f"expected norm to be one of {', '.join(offered)}, got {name!r}{why}")


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation of the last axis in the input's type.

    Under autocast the input may be narrower than the weight, for which torch leaves its fused kernel.
    """

    def forward(self, x: Shaped) -> Shaped:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def zeroed(layer: M) -> M:
    """The layer with all its parameters set to zero: a block that ends in it starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
