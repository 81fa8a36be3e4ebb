"""Predictions: what a network's output means, as two coefficients.

The output estimates `a x + b eps`:

    Eps    (0, 1)             noise
    X0     (1, 0)             data
    V      (-sigma, alpha)    velocity of arXiv:2202.00512
    Flow   (-1, 1)            d z / dt on the straight path

With D = alpha b - sigma a (that is alpha, -sigma, alpha^2 + sigma^2, alpha + sigma), for z = alpha x + sigma eps:

    (1)  x   = (b z - sigma out) / D
    (2)  eps = (alpha out - a z) / D

Consistency models speak V with a boundary condition (`BoundaryV`, arXiv:2303.01469, Eq. 25): with r = sigma / alpha and
r_0 the ratio at which a network must return its input,

    (3)  x = z / (alpha ((r - r_0)^2 + 1)) - out (r - r_0) / sqrt(r^2 + 1)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffzoo.typing import PerSample

__all__ = ["X0", "BoundaryV", "Eps", "Flow", "Prediction", "V"]


class Inverse(NamedTuple):
    """Coefficients of (1) and (2): `x = (x_z z + x_out out) / divisor`, and eps alike."""

    x_z: PerSample
    x_out: PerSample
    eps_z: PerSample
    eps_out: PerSample
    divisor: PerSample


class Prediction(ABC):
    """The prediction target, as coefficients of data and noise."""

    @abstractmethod
    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        """(a, b) such that the output estimates `a x + b eps`."""

    def determinant(self, alpha: PerSample, sigma: PerSample) -> PerSample:
        """D = alpha b - sigma a, the divisor of (1) and (2)."""
        a, b = self.coefficients(alpha, sigma)
        return alpha * b - sigma * a

    def inverse(self, alpha: PerSample, sigma: PerSample) -> Inverse:
        """The coefficients of (1) and (2)."""
        a, b = self.coefficients(alpha, sigma)
        return Inverse(b, -sigma, -a, alpha, alpha * b - sigma * a)


@dataclass(frozen=True)
class Eps(Prediction):
    """The noise."""

    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class X0(Prediction):
    """The clean data."""

    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)


@dataclass(frozen=True)
class V(Prediction):
    """v = alpha eps - sigma x."""

    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        return -sigma, alpha


@dataclass(frozen=True)
class Flow(Prediction):
    """eps - x, the velocity of flow matching with t = 1 at noise."""

    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class BoundaryV(V):
    """V of a network that returns its input at the data end of its noise levels: (3), of consistency models.

    Args:
        ratio_min: r_0, the sigma / alpha (of data divided by the data scale) where x = z / alpha exactly; with 0 this
            is V. The published models have 0.002 / 0.5.
    """

    ratio_min: float = 0.004

    def coefficients(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        keep, use = self._mixing(alpha, sigma)
        return (keep - 1) / use, keep * sigma / (alpha * use)

    def inverse(self, alpha: PerSample, sigma: PerSample) -> Inverse:
        keep, use = self._mixing(alpha, sigma)  # the output has no weight at the boundary, so D is infinite there
        return Inverse(keep / alpha, -use, (1 - keep) / sigma, use * alpha / sigma, torch.ones_like(alpha))

    def _mixing(self, alpha: PerSample, sigma: PerSample) -> tuple[PerSample, PerSample]:
        """alpha times the factor of z in (3), and the factor of the output."""
        ratio = sigma / alpha
        above = ratio - self.ratio_min
        return 1 / (above.square() + 1), above / (ratio.square() + 1).sqrt()
