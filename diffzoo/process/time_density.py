"""Densities of the training times: which noise levels a network sees how often.

A loss that is drawn at t ~ p and not divided by p is

    (1)  E_{t ~ p} [w(t) L(t)] = integral of p(t) w(t) L(t) dt

so a density is a weighting: drawing from p with the weighting w trains for the same objective as drawing uniformly with
the weighting p w (`weightings.py`), at another variance of the gradient. A recipe states the importance of a noise
level once, as one or the other. Public recipes that name a density (Stable Diffusion 3, EDM) mean it together with
their loss weight; our weighting `EDM` is the product of the two and goes with uniform times.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.typing import PerSample

__all__ = ["CosMap", "LogNormalSigma", "LogitNormal", "TimeDensity"]


def _check_std(std: float) -> None:
    if std <= 0:
        raise UserError(f"the standard deviation of a time density must be positive, got {std}")


def _normal(u: PerSample) -> PerSample:
    """Uniform to standard normal."""
    return torch.special.ndtri(u.double())


class TimeDensity(ABC):
    """p(t) on [0, 1], as the map from uniform numbers to times, so that evenly spread draws stay evenly spread."""

    @abstractmethod
    def times(self, process: GaussianProcess, u: PerSample) -> PerSample:
        """Times in [0, 1] for numbers in [0, 1); increasing."""

    @abstractmethod
    def density(self, process: GaussianProcess, t: PerSample) -> PerSample:
        """p(t)."""


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """log(t / (1 - t)) ~ N(mean, std^2) (arXiv:2403.03206, Sec. 3.1; Stable Diffusion 3 has mean 0 and std 1).

    A positive mean favours noise.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def times(self, process: GaussianProcess, u: PerSample) -> PerSample:
        return torch.sigmoid(self.mean + self.std * _normal(u)).to(u.dtype)

    def density(self, process: GaussianProcess, t: PerSample) -> PerSample:
        x = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-(x**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class CosMap(TimeDensity):
    """p(t) = 2 / (pi (1 - 2 t + 2 t^2)): the cosine schedule seen on the straight path (arXiv:2403.03206, Sec. 3.1)."""

    def times(self, process: GaussianProcess, u: PerSample) -> PerSample:
        return (1 - 1 / (torch.tan(math.pi / 2 * u.double()) + 1)).to(u.dtype)

    def density(self, process: GaussianProcess, t: PerSample) -> PerSample:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass(frozen=True)
class LogNormalSigma(TimeDensity):
    """ln(sigma / alpha) ~ N(mean, std^2), on any schedule (arXiv:2206.00364, Table 1: EDM has mean -1.2 and std 1.2).

    Noise levels beyond the ends of the schedule become the ends.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std(self.std)

    def times(self, process: GaussianProcess, u: PerSample) -> PerSample:
        logsnr = -2 * (self.mean + self.std * _normal(u))
        ends = process.schedule.logsnr_min, process.schedule.logsnr_max
        return process.schedule.time(logsnr.clamp(*ends)).clamp(0, 1).to(u.dtype)

    def density(self, process: GaussianProcess, t: PerSample) -> PerSample:
        x = (-process.logsnr(t) / 2 - self.mean) / self.std
        slope = -process.schedule.derivative(t) / 2
        return torch.exp(-(x**2) / 2) / (self.std * math.sqrt(2 * math.pi)) * slope
