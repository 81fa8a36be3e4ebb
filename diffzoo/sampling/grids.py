"""Time grids: the times at which a sampler stops on its way from noise to data.

A grid gives `steps + 1` times, strictly decreasing from `t_start` to `t_end`, in float64. The ends are times of the
process; `for_sigmas` finds them for two values of sigma / alpha.

    UniformTime       t equally spaced; the usual choice for cosine and flow schedules
    UniformThenZero   the same down to `t_end`, and a last step from there to 0; Euler-Maruyama of U-ViT
    UniformLogSNR     log-SNR equally spaced, k-diffusion's "exponential" grid of sigmas; for DPM-Solver in pixel space,
                      and the grid on which orders are measured
    Polyexponential   log(sigma / alpha) falls as the power rho of what is left of the way; rho = 1 is `UniformLogSNR`
    Karras            (sigma / alpha)^(1/rho) equally spaced (arXiv:2206.00364, Eq. 5)
    PowerTime         t^(1/power) equally spaced: more stops near the data for power > 1
    ShiftedTime       t -> shift t / (1 + (shift - 1) t): more stops near the noise for shift > 1 (arXiv:2403.03206)
    Given             times, log-SNRs or sigmas that you name one by one
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch

from diffzoo.errors import UserError, check_choice
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.typing import Times

__all__ = [
    "Given",
    "Grid",
    "Karras",
    "Polyexponential",
    "PowerTime",
    "ShiftedTime",
    "UniformLogSNR",
    "UniformThenZero",
    "UniformTime",
]

Unit = Literal["t", "logsnr", "sigma"]


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

    def times(self, process: GaussianProcess, steps: int) -> Times:
        """Decreasing times, float64 `(steps + 1,)`; the ends are exact."""
        t = self._between(process, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        t[0], t[-1] = self.t_start, self.t_end
        return t

    @classmethod
    def for_sigmas(
        cls, process: GaussianProcess, sigma_min: float = 0.002, sigma_max: float = 80.0, **options: Any
    ) -> Self:
        """The grid between two values of sigma / alpha, EDM's by default, cut to what the schedule covers.

        EDM's range is log-SNR from -8.76 to 12.43.

        Args:
            process: its schedule maps sigma / alpha to times.
            sigma_min, sigma_max: the ends.
            **options: other fields of the grid, such as rho.
        """
        logsnr = -2 * torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
        first, last = process.schedule.time(logsnr).clamp(0, 1).tolist()
        return cls(first, last, **options)

    @abstractmethod
    def _between(self, process: GaussianProcess, u: Times) -> Times:
        """The times at fractions `u` of the way, 0 = start and 1 = end."""

    def _ends(self) -> Times:
        return torch.tensor([self.t_start, self.t_end], dtype=torch.float64)


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps in t."""

    def _between(self, process: GaussianProcess, u: Times) -> Times:
        return self.t_start + u * (self.t_end - self.t_start)


@dataclass(frozen=True)
class UniformThenZero(UniformTime):
    """`steps` equally spaced times from `t_start` to `t_end`, then 0."""

    t_end: float = 1e-3

    def times(self, process: GaussianProcess, steps: int) -> Times:
        if steps < 2:
            raise UserError(f"this grid needs at least 2 steps, got {steps}")
        return torch.cat([super().times(process, steps - 1), torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps in log-SNR."""

    def _between(self, process: GaussianProcess, u: Times) -> Times:
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

    def _between(self, process: GaussianProcess, u: Times) -> Times:
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

    def _between(self, process: GaussianProcess, u: Times) -> Times:
        def unshift(t: float) -> float:
            return t / (self.shift + (1 - self.shift) * t)

        first, last = unshift(self.t_start), unshift(self.t_end)
        t = first + u * (last - first)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in `(sigma / alpha)^(1/rho)`, the noise level in units of the data (arXiv:2206.00364, Eq. 5)."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise UserError(f"rho must be positive, got {self.rho}")

    def _between(self, process: GaussianProcess, u: Times) -> Times:
        first, last = torch.exp(-process.logsnr(self._ends()) / (2 * self.rho))
        sigma = (first + u * (last - first)) ** self.rho
        return process.schedule.time(-2 * sigma.log())


@dataclass(frozen=True)
class Polyexponential(Grid):
    """`log(sigma / alpha)` falls as `(1 - i / steps)^rho`: long steps at the noise for rho > 1, at the data below 1."""

    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise UserError(f"rho must be positive, got {self.rho}")

    def _between(self, process: GaussianProcess, u: Times) -> Times:
        first, last = process.logsnr(self._ends())
        return process.schedule.time(last + (1 - u) ** self.rho * (first - last))


@dataclass(frozen=True)
class Given(Grid):
    """Stops that are named one by one, from noise to data; `t_start` and `t_end` are not used.

    A last sigma of 0 is no stop: leave it out, and take a sampler's final "denoise".

    Args:
        values: one more than the sampler's steps, strictly monotone.
        unit: what they are: "t"; "logsnr"; or "sigma", meaning sigma / alpha, EDM's noise level.
    """

    values: Sequence[float] = ()
    unit: Unit = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))  # lists come from YAML; hashable
        check_choice("unit", self.unit, Unit)
        sign = -1 if self.unit == "logsnr" else 1
        if len(self.values) < 2 or any(sign * b >= sign * a for a, b in pairwise(self.values)):
            direction = "increasing" if self.unit == "logsnr" else "decreasing"
            raise UserError(f"expected at least two strictly {direction} values of {self.unit}, got {self.values}")
        if self.unit == "sigma" and self.values[-1] <= 0:
            raise UserError("expected positive sigmas: leave out the last 0, and take a sampler with final 'denoise'")

    def times(self, process: GaussianProcess, steps: int) -> Times:
        """The times of the values, float64 `(steps + 1,)`.

        Raises:
            UserError: for another number of steps, or values that the schedule does not reach.
        """
        if len(self.values) != steps + 1:
            raise UserError(f"{len(self.values)} values make {len(self.values) - 1} steps, got steps={steps}")
        return self._between(process, torch.linspace(0, 1, steps + 1, dtype=torch.float64))

    def _between(self, process: GaussianProcess, u: Times) -> Times:
        values = torch.tensor(self.values, dtype=torch.float64)
        t = values
        if self.unit != "t":
            t = process.schedule.time(values if self.unit == "logsnr" else -2 * values.log())
        outside = (t < -1e-6) | (t > 1 + 1e-6)  # tables of sigmas are often in float32
        if outside.any():
            low, high = process.schedule.logsnr_min, process.schedule.logsnr_max
            raise UserError(
                f"{self.unit} = {float(values[outside][0]):g} lies outside the schedule, whose log-SNR goes from "
                f"{low:g} to {high:g}"
            )
        return t.clamp(0, 1)
