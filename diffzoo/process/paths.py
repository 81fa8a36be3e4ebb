"""Paths: how much signal and noise a log-SNR means.

    variance preserving   alpha = sqrt(sigmoid(logsnr)),  sigma = sqrt(sigmoid(-logsnr))   alpha^2 + sigma^2 = 1
    straight (flow)       alpha = sigmoid(logsnr / 2),    sigma = sigmoid(-logsnr / 2)     alpha + sigma = 1
                          or alpha + sigma / n = 1 with noise of standard deviation n
    variance exploding    alpha = 1,                      sigma = exp(-logsnr / 2)

All satisfy 2 log(alpha / sigma) = logsnr. sigma is never computed as sqrt(1 - alpha^2): in float32 that loses three
digits at logsnr 14 and everything at 18.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from diffzoo.typing import PerSample

__all__ = ["Path", "Straight", "VarianceExploding", "VariancePreserving"]


class Path(ABC):
    """log-SNR to the coefficients of `z = alpha x + sigma eps`."""

    @abstractmethod
    def coefficients(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        """(alpha, sigma), each of the shape of `logsnr`."""

    @abstractmethod
    def derivatives(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        """d alpha / d logsnr and d sigma / d logsnr."""


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1 (DDPM, Simple Diffusion)."""

    def coefficients(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def derivatives(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        alpha, sigma = self.coefficients(logsnr)
        return alpha * sigma**2 / 2, -sigma * alpha**2 / 2


@dataclass(frozen=True)
class Straight(Path):
    """alpha + sigma / n = 1 (rectified flow, flow matching).

    Args:
        noise_scale: n, the standard deviation of z at the noise end; 2 for JiT at 512 pixels (arXiv:2511.13720).
    """

    noise_scale: float = 1.0

    def coefficients(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        half = logsnr / 2 + math.log(self.noise_scale)
        return torch.sigmoid(half), self.noise_scale * torch.sigmoid(-half)

    def derivatives(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        alpha, sigma = self.coefficients(logsnr)
        change = alpha * sigma / 2
        return change / self.noise_scale, -change


@dataclass(frozen=True)
class VarianceExploding(Path):
    """alpha = 1 (EDM, score SDE's VE)."""

    def coefficients(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        return torch.ones_like(logsnr), torch.exp(-logsnr / 2)

    def derivatives(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        return torch.zeros_like(logsnr), -torch.exp(-logsnr / 2) / 2
