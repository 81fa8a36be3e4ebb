"""Weightings: which noise levels matter, written once as w(logsnr) on the squared error of eps.

Whatever the network predicts, `eps_hat - eps = (alpha / D) (out_hat - out)`, so a weighting converts itself
(`loss.py`). A weighting also names its measure: "time" weighs a uniform t as it comes (DDPM's simple loss), while
"logsnr" multiplies by -d logsnr / dt, so that the loss is an integral over log-SNR and does not depend on the
schedule (the ELBO and the sigmoid weighting, arXiv:2303.00848). Mixing up the two is the usual silent difference
between code bases.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from diffzoo.errors import check_choice
from diffzoo.typing import PerSample

__all__ = ["EDM", "ELBO", "EDMWeight", "MinSNR", "Sigmoid", "UniformEps", "UniformFlow", "UniformV", "Weighting"]

Measure = Literal["time", "logsnr"]


class Weighting(ABC):
    """w(logsnr) on the eps error, and the measure it is integrated against."""

    measure: Measure

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, Measure)

    @abstractmethod
    def __call__(self, logsnr: PerSample) -> PerSample:
        """Weight of the squared eps error at `logsnr`."""


@dataclass(frozen=True)
class UniformEps(Weighting):
    """w = 1: the mean squared error of the noise (arXiv:2006.11239, L_simple; U-Nets of arXiv:2301.11093)."""

    measure: Measure = "time"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return torch.ones_like(logsnr)


@dataclass(frozen=True)
class UniformV(Weighting):
    """The mean squared error of v (U-ViTs of arXiv:2301.11093): w = 1 / alpha^2 = 1 + exp(-logsnr)."""

    measure: Measure = "time"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return 1 + torch.exp(-logsnr)


@dataclass(frozen=True)
class UniformFlow(Weighting):
    """The mean squared error of the straight path's velocity eps - x, whatever the network predicts.

    With u = sigma / n, the noise fraction, the velocity is (z - x) / u up to its sign, so an error of x counts 1 / u^2;
    JiT, which predicts x, divides by u = 0.05 at least (arXiv:2511.13720, "v-loss" of x-prediction).

    Args:
        floor: the least u to divide by, in [0, 1).
        noise_scale: n of `paths.Straight`.
    """

    floor: float = 0.0
    noise_scale: float = 1.0
    measure: Measure = "time"

    def __call__(self, logsnr: PerSample) -> PerSample:
        fraction = torch.sigmoid(-logsnr / 2 - math.log(self.noise_scale))
        return torch.exp(-logsnr) / fraction.clamp_min(self.floor).square()


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """w = sigmoid(bias - logsnr) (arXiv:2303.00848; arXiv:2410.19324, Eq. 4).

    The same as `exp(bias) sigmoid(logsnr - bias)` on the squared error of x.

    Args:
        bias: log-SNR at which the weight is one half; lower for higher resolutions.
        measure: "logsnr" as in the paper; "time" where a code base leaves out -d logsnr / dt.
    """

    bias: float = -1.0
    measure: Measure = "logsnr"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return torch.sigmoid(self.bias - logsnr)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma) on the x error, hence min(1, gamma / SNR) on the eps error (arXiv:2303.09556)."""

    gamma: float = 5.0
    measure: Measure = "time"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return (self.gamma * torch.exp(-logsnr)).clamp_max(1.0)


@dataclass(frozen=True)
class EDM(Weighting):
    """EDM's loss weight times its density of noise levels (arXiv:2206.00364, Table 1).

    There ln(sigma) ~ N(p_mean, p_std^2) and the x error weighs (sigma^2 + s^2) / (sigma s)^2, s = sigma_data; with
    sigma = exp(-logsnr / 2) the density of logsnr is N(-2 p_mean, (2 p_std)^2) and the weight on eps
    (exp(-logsnr) + s^2) / s^2.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    measure: Measure = "logsnr"

    def __call__(self, logsnr: PerSample) -> PerSample:
        mean, std = -2 * self.p_mean, 2 * self.p_std
        density = torch.exp(-0.5 * ((logsnr - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        return density * (torch.exp(-logsnr) + self.sigma_data**2) / self.sigma_data**2


@dataclass(frozen=True)
class EDMWeight(Weighting):
    """EDM's loss weight alone: the squared error of the network's own output, for times drawn by `LogNormalSigma`.

    On the x error it is (sigma^2 + s^2) / (sigma s)^2, s = sigma_data, which is 1 on the error of the output
    (arXiv:2206.00364, Table 1).
    """

    sigma_data: float = 0.5
    measure: Measure = "time"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return 1 + torch.exp(-logsnr) / self.sigma_data**2


@dataclass(frozen=True)
class ELBO(Weighting):
    """w = 1 over log-SNR: the variational bound, up to a factor of one half (arXiv:2107.00630)."""

    measure: Measure = "logsnr"

    def __call__(self, logsnr: PerSample) -> PerSample:
        return torch.ones_like(logsnr)
