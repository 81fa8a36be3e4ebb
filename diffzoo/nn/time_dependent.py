"""Norms whose scale and offset move with the noise level (DiMR, arXiv:2406.09416, section 3.2).

A time-dependent parameter is a pair of learned vectors and a learned, gated way from one to the other,

    (1)  p(tau) = low + g (high - low),    g = sigmoid((1 + slope) tau + shift),

element by element: two extra vectors instead of the `c x 6c` matrix of adaptive layer norm. `tau` is the noise level
scaled to about [-1, 1].

All norms here have one call, `norm(x, tau)`, with channels last, so that a family can offer them as one choice
(`NORMS`). They compute in float32 where the input has fewer bits.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import UserError, did_you_mean
from diffzoo.nn.vit_layers import Linear
from diffzoo.typing import NoiseLevel

__all__ = [
    "NORMS",
    "AdaRMSNorm",
    "RMSNorm",
    "TimeDependentLayerNorm",
    "TimeDependentParameter",
    "TimeDependentRMSNorm",
    "build_norm",
    "gate_parameters",
    "scaled_level",
]

Channels = Float[Tensor, "b *n c"]
FirstRow = Float[Tensor, "b 1 *rest"]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _working(out: Tensor, x: Tensor) -> Tensor:
    """`out` in the dtype that the next linear layer works in: cast here once, not once per layer that reads it."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return out.to(torch.get_autocast_dtype(device))
    return out.to(x.dtype)


def _over_positions(values: Tensor, x: Tensor) -> Tensor:
    """`(b, c)` to a shape that broadcasts against `x` `(b, ..., c)`."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 2), values.shape[-1])


def _over_rms(x: Tensor) -> Tensor:
    # 1e-8 is added to the root, not inside it: the two differ for activations near it
    x = _wide(x)
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)


def scaled_level(noise_level: NoiseLevel, low: float, high: float) -> Float[Tensor, "b"]:
    """`tau`: noise levels `(b,)` with `low` at -1 and `high` at 1, linearly and also beyond; at least float32.

    Whether `tau` grows or falls with noise does not matter: in (1) the two ends may change places.
    """
    return (2 * _wide(noise_level) - (low + high)) / (high - low)


class TimeDependentParameter(nn.Module):
    """A vector that is a function of the noise level — (1).

    `slope` and `shift` start at zero and are meant to be exempt from weight decay (`gate_parameters`).

    Args:
        width: length of the vector.
        init: first value of both ends.
    """

    def __init__(self, width: int, init: float):
        super().__init__()
        self.high = nn.Parameter(torch.full((width,), init))
        self.low = nn.Parameter(torch.full((width,), init))
        self.slope = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, tau: NoiseLevel) -> Float[Tensor, "b c"]:
        """Values `(b, width)` at `tau` `(b,)`, at least float32."""
        slope = 1 + _wide(self.slope)
        gate = torch.sigmoid(torch.addcmul(_wide(self.shift), tau.to(slope.dtype)[:, None], slope))
        return torch.lerp(_wide(self.low), _wide(self.high), gate)


class TimeDependentLayerNorm(nn.Module):
    """TD-LN: layer norm with time-dependent scale and offset.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = TimeDependentParameter(width, 1.0)
        self.bias = TimeDependentParameter(width, 0.0)

    def forward(self, x: Channels, tau: NoiseLevel) -> Channels:
        """Normalise `x` `(b, ..., c)` over channels at `tau` `(b,)`."""
        weight, bias = (_over_positions(p(tau), x) for p in (self.weight, self.bias))
        return _working(torch.addcmul(bias, weight, F.layer_norm(_wide(x), x.shape[-1:], eps=1e-5)), x)


class TimeDependentRMSNorm(nn.Module):
    """TD-RMSN: root-mean-square norm with a time-dependent scale, and an offset if asked.

    Args:
        width: channels.
        bias: add a time-dependent offset.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.scale = TimeDependentParameter(width, 1.0)
        self.offset = TimeDependentParameter(width, 0.0) if bias else None

    def forward(self, x: Channels, tau: NoiseLevel) -> Channels:
        """Normalise `x` `(b, ..., c)` over channels at `tau` `(b,)`."""
        scale = _over_positions(self.scale(tau), x)
        if self.offset is None:
            return _working(_over_rms(x) * scale, x)
        return _working(torch.addcmul(_over_positions(self.offset(tau), x), _over_rms(x), scale), x)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a plain scale; `tau` is ignored.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Channels, tau: NoiseLevel | None = None) -> Channels:
        """Normalise `x` `(b, ..., c)` over channels."""
        return _working(_over_rms(x) * _wide(self.scale), x)


class AdaRMSNorm(nn.Module):
    """Root-mean-square norm whose scale is a linear function of the input's own first row; `tau` is ignored.

    For tokens `(b, n, c)` that row is the first token (the class token, where there is one); for maps
    `(b, h, w, c)` it is the first row of the map, so that each column has its scale.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Channels, tau: NoiseLevel | None = None, condition: FirstRow | None = None) -> Channels:
        """Normalise `x` `(b, ..., c)`; `condition` `(b, 1, ..., c)` replaces the first row."""
        scale = 1 + self.linear(x[:, :1] if condition is None else condition)
        wide = _wide(x)
        return _working(wide * scale * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), x)


NORMS: dict[str, type[nn.Module]] = {
    "td_ln": TimeDependentLayerNorm,
    "td_rmsn": TimeDependentRMSNorm,
    "rmsn": RMSNorm,
    "ada_rmsn": AdaRMSNorm,
}


def build_norm(name: str, width: int) -> nn.Module:
    """A norm of `NORMS` by name, to be called as `norm(x, tau)`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in NORMS:
        raise UserError(f"unknown norm {name!r}{did_you_mean(name, NORMS)}")
    return NORMS[name](width)


def gate_parameters(module: nn.Module) -> set[str]:
    """Full names of all `slope` and `shift`: the parameters of the gates in (1)."""
    gates = (n for n, m in module.named_modules() if isinstance(m, TimeDependentParameter))
    return {f"{name}.{part}" if name else part for name in gates for part in ("slope", "shift")}
