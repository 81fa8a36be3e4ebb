"""Where a sampler stops on its way from noise to data.

A grid gives `steps + 1` times, strictly decreasing from `t_start` to `t_end`, in float64. All numbers in the
configuration are times of the process; Karras's sigmas are derived from them.

    UniformTime       t equally spaced; the usual choice for cosine and flow schedules
    UniformThenZero   the same down to `t_end`, and a last step from there to 0; Euler-Maruyama of U-ViT
    UniformLogSNR     log-SNR equally spaced; for DPM-Solver in pixel space, and the grid on which orders are measured
    PowerTime         t^(1/power) equally spaced: more stops near the data for power > 1
    ShiftedTime       t -> shift t / (1 + (shift - 1) t): more stops near the noise for shift > 1 (arXiv:2403.03206)
    Karras            (sigma / alpha)^(1/rho) equally spaced (arXiv:2206.00364, Eq. 5)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess

__all__ = ["Grid", "Karras", "PowerTime", "ShiftedTime", "UniformLogSNR", "UniformThenZero", "UniformTime"]


@dataclass(frozen=True)
class Grid(ABC):
    """Times from `t_start` down to `t_end`.

    Args:
        t_start: where sampling starts; 1 = pure noise.
        t_end: where it ends; 0 = the data end of the schedule. Public U-ViT and DiMR samplers stop at 1e-3 (latents)
            or 1e-4 (pixels).
    """

    t_start: float = 1.0
    t_end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_end < self.t_start <= 1:
            raise UserError(f"expected 0 <= t_end < t_start <= 1, got t_end={self.t_end} and t_start={self.t_start}")

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        """Decreasing times, float64 `(steps + 1,)`; the ends are exact."""
        t = self._between(process, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        t[0], t[-1] = self.t_start, self.t_end
        return t

    @abstractmethod
    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        """The times at fractions `u` of the way, 0 = start and 1 = end."""

    def _ends(self) -> Tensor:
        return torch.tensor([self.t_start, self.t_end], dtype=torch.float64)


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps in t."""

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        return self.t_start + u * (self.t_end - self.t_start)


@dataclass(frozen=True)
class UniformThenZero(Grid):
    """`steps` equally spaced times from `t_start` to `t_end`, then 0."""

    t_end: float = 1e-3

    def times(self, process: GaussianProcess, steps: int) -> Tensor:
        if steps < 2:
            raise UserError(f"this grid needs at least 2 steps, got {steps}")
        return torch.cat([super().times(process, steps - 1), torch.zeros(1, dtype=torch.float64)])

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        return self.t_start + u * (self.t_end - self.t_start)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps in log-SNR."""

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        first, last = process.logsnr(self._ends())
        return process.schedule.time(first + u * (last - first))


@dataclass(frozen=True)
class PowerTime(Grid):
    """Equal steps in `t^(1/power)`; power 2 is the quadratic grid of DDIM and DPM-Solver."""

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise UserError(f"the power of a time grid must be positive, got {self.power}")

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        first, last = self.t_start ** (1 / self.power), self.t_end ** (1 / self.power)
        return (first + u * (last - first)) ** self.power


@dataclass(frozen=True)
class ShiftedTime(Grid):
    """Equal steps in t, then `shift t / (1 + (shift - 1) t)`.

    On flow matching's schedule this adds `-2 log(shift)` to every log-SNR, as a shifted schedule does for a higher
    resolution, but at sampling time alone.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift <= 0:
            raise UserError(f"the shift of a time grid must be positive, got {self.shift}")

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        def unshift(t: float) -> float:
            return t / (self.shift + (1 - self.shift) * t)

        first, last = unshift(self.t_start), unshift(self.t_end)
        t = first + u * (last - first)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in `(sigma / alpha)^(1/rho)`, the noise level in units of the data (arXiv:2206.00364, Eq. 5).

    EDM's own range, sigma from 80 to 0.002, is log-SNR from -8.76 to 12.43; `for_sigmas` finds the times.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise UserError(f"rho must be positive, got {self.rho}")

    @classmethod
    def for_sigmas(
        cls, process: GaussianProcess, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> "Karras":
        """The grid between two values of sigma / alpha, cut to what the schedule covers."""
        logsnr = -2 * torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
        first, last = process.schedule.time(logsnr).clamp(0, 1).tolist()
        return cls(first, last, rho)

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        first, last = torch.exp(-process.logsnr(self._ends()) / (2 * self.rho))
        sigma = (first + u * (last - first)) ** self.rho
        return process.schedule.time(-2 * sigma.log())
