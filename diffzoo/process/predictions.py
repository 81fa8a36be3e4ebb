"""Predictions: what a network's output means, as two coefficients.

The output estimates `a x + b eps`:

    Eps    (0, 1)             noise
    X0     (1, 0)             data
    V      (-sigma, alpha)    velocity of arXiv:2202.00512
    Flow   (-1, 1)            d z / dt on the straight path

With D = alpha b - sigma a (that is alpha, -sigma, alpha^2 + sigma^2, alpha + sigma), for z = alpha x + sigma eps:

    (1)  x   = (b z - sigma out) / D
    (2)  eps = (alpha out - a z) / D
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["X0", "Eps", "Flow", "Prediction", "V"]


class Prediction(ABC):
    """What is predicted, as the coefficients of data and noise."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that the output estimates `a x + b eps`."""

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """D = alpha b - sigma a, the divisor of (1) and (2)."""
        a, b = self.coefficients(alpha, sigma)
        return alpha * b - sigma * a


@dataclass(frozen=True)
class Eps(Prediction):
    """The noise."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class X0(Prediction):
    """The clean data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)


@dataclass(frozen=True)
class V(Prediction):
    """v = alpha eps - sigma x."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


@dataclass(frozen=True)
class Flow(Prediction):
    """eps - x, the velocity of flow matching with t = 1 at noise."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)
