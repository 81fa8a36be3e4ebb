"""Noise conditioning: which number a network was trained to see at time t.

`LogSNRConditioning` for Simple Diffusion; `TimeConditioning(scale, offset)` for everything that is linear in time:
999 t (U-ViT in continuous time), 1000 t (U-ViT and others on the discrete Stable-Diffusion schedule, n = 1..1000),
1000 t - 1 (ADM, index 0..999), 8 t - 4 (DiMR).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LogSNRConditioning", "NoiseConditioning", "TimeConditioning"]


class NoiseConditioning(ABC):
    """The number a network reads."""

    @abstractmethod
    def __call__(self, t: Tensor, logsnr: Tensor) -> Tensor:
        """The noise level at time `t`, where the schedule has `logsnr`."""


@dataclass(frozen=True)
class LogSNRConditioning(NoiseConditioning):
    """The log-SNR itself."""

    def __call__(self, t: Tensor, logsnr: Tensor) -> Tensor:
        return logsnr


@dataclass(frozen=True)
class TimeConditioning(NoiseConditioning):
    """`scale t + offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, t: Tensor, logsnr: Tensor) -> Tensor:
        return self.scale * t + self.offset
