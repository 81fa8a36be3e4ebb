"""Paths: how much signal and noise a log-SNR means.

    variance preserving   alpha = sqrt(sigmoid(logsnr)),  sigma = sqrt(sigmoid(-logsnr))   alpha^2 + sigma^2 = 1
    straight (flow)       alpha = sigmoid(logsnr / 2),    sigma = sigmoid(-logsnr / 2)     alpha + sigma = 1
    variance exploding    alpha = 1,                      sigma = exp(-logsnr / 2)

All satisfy 2 log(alpha / sigma) = logsnr. sigma is never computed as sqrt(1 - alpha^2): in float32 that loses three
digits at logsnr 14 and everything at 18.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Path", "Straight", "VarianceExploding", "VariancePreserving"]


class Path(ABC):
    """log-SNR to the coefficients of `z = alpha x + sigma eps`."""

    @abstractmethod
    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each of the shape of `logsnr`."""

    @abstractmethod
    def derivatives(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / d logsnr and d sigma / d logsnr."""


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1 (DDPM, Simple Diffusion)."""

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def derivatives(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(logsnr)
        return alpha * sigma**2 / 2, -sigma * alpha**2 / 2


@dataclass(frozen=True)
class Straight(Path):
    """alpha + sigma = 1 (rectified flow, flow matching)."""

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)

    def derivatives(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(logsnr)
        return alpha * sigma / 2, -alpha * sigma / 2


@dataclass(frozen=True)
class VarianceExploding(Path):
    """alpha = 1 (EDM, score SDE's VE)."""

    def coefficients(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(logsnr), torch.exp(-logsnr / 2)

    def derivatives(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(logsnr), -torch.exp(-logsnr / 2) / 2
