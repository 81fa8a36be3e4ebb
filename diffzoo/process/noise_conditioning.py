"""Noise conditioning: which number a network was trained to see at time t.

`LogSNRConditioning` is the log-SNR itself for Simple Diffusion; with sigma = exp(-logsnr / 2) it is ln(sigma) / 4 for
EDM and EDM2 (scale -1/8) and 250 ln(sigma) for consistency models (scale -125).

`TimeConditioning(scale, offset)` is for everything that is linear in time: 999 t (U-ViT in continuous time), 1000 t
(U-ViT and others on the discrete Stable-Diffusion schedule, n = 1..1000), 1000 t - 1 (ADM, index 0..999), 1 - t (SiT
and JiT, which count from noise to data), 8 t - 4 (DiMR).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from diffzoo.typing import PerSample, Times

__all__ = ["LogSNRConditioning", "NoiseConditioning", "TimeConditioning"]


class NoiseConditioning(ABC):
    """The number a network reads."""

    @abstractmethod
    def __call__(self, t: Times, logsnr: PerSample) -> PerSample:
        """The noise level at time `t`, where the schedule has `logsnr`."""


@dataclass(frozen=True)
class LogSNRConditioning(NoiseConditioning):
    """`scale logsnr + offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, t: Times, logsnr: PerSample) -> PerSample:
        return self.scale * logsnr + self.offset


@dataclass(frozen=True)
class TimeConditioning(NoiseConditioning):
    """`scale t + offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, t: Times, logsnr: PerSample) -> PerSample:
        return self.scale * t + self.offset
