"""Noise schedules: how noise grows with time, stated as log-SNR.

A schedule maps `t` in [0, 1] (0 = data, 1 = noise) to `logsnr = log(alpha^2 / sigma^2)`, strictly decreasing, and
back. It knows nothing of alpha and sigma: any schedule combines with any path (`paths.py`).

    (1) cosine        logsnr(t) = -2 log tan(pi t / 2), time rescaled so that the ends hit the bounds
                      (arXiv:2301.11093 appendix; first in arXiv:2102.09672)
    (2) shifted       logsnr(t) + 2 log(reference / resolution)          (arXiv:2301.11093, Eq. 4-5)
    (3) interpolated  (1 - t) logsnr_at_data(t) + t logsnr_at_noise(t)   (arXiv:2301.11093, Eq. 6; see `Interpolated`)
    (4) linear time   2 log((1 - t) / t): alpha = 1 - t on the straight path, flow matching
    (5) linear beta   -log(exp(beta_min t + (beta_max - beta_min) t^2 / 2) - 1): the VP-SDE of arXiv:2011.13456
    (6) offset cosine 2 log alpha = 2 log cos((t + s) / (1 + s) pi / 2) + const, alpha(0) = 1, in true time
                      (arXiv:2102.09672, Eq. 17, as continuous-time code has it)
    (7) discrete      tables of N betas (DDPM, Stable Diffusion, ADM), log alpha interpolated linearly in t
    (8) linear logsnr (1 - t) max + t min: time is a name for the log-SNR alone (EDM, EDM2, consistency models)

Times and log-SNRs are tensors of any shape; arithmetic runs in float64 where the device has it, since tan and log
lose three digits near the ends in float32, and the result has the dtype of the argument.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffzoo.errors import UserError, check_choice
from diffzoo.process.table import on_device
from diffzoo.typing import PerSample, Times

__all__ = [
    "Cosine",
    "DiscreteBetas",
    "Interpolated",
    "LinearBeta",
    "LinearLogSNR",
    "LinearTime",
    "OffsetCosine",
    "Schedule",
    "Shifted",
]

BetaKind = Literal["linear", "scaled_linear", "cosine"]


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _line(first: float, last: float, count: int) -> Tensor:
    # a table is a fact and lives on the CPU, also while a network is built on the meta device
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


class Schedule(ABC):
    """`t` in [0, 1] to log-SNR and back; strictly decreasing."""

    def logsnr(self, t: Times) -> PerSample:
        """Log signal-to-noise ratio at time `t`, of any shape."""
        return self._logsnr(_precise(t)).to(t.dtype)

    def time(self, logsnr: PerSample) -> Times:
        """The time at which the schedule has this log-SNR: the inverse of `logsnr`."""
        return self._time(_precise(logsnr)).to(logsnr.dtype)

    def derivative(self, t: Times) -> PerSample:
        """d logsnr / dt at `t`, negative."""
        return self._derivative(_precise(t)).to(t.dtype)

    @abstractmethod
    def _logsnr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _derivative(self, t: Tensor) -> Tensor: ...

    def _time(self, logsnr: Tensor) -> Tensor:
        # bisection serves every monotone schedule to the last bit of float64; closed forms override it
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = self._logsnr(middle) < logsnr
            high, low = torch.where(noisier, middle, high), torch.where(noisier, low, middle)
        return (low + high) / 2

    def snap(self, t: Times) -> Times:
        """Times that a network of this schedule is trained at: all, unless the schedule has steps."""
        return t

    @property
    def logsnr_max(self) -> float:
        """Log-SNR at t = 0."""
        return float(self._logsnr(torch.zeros((), dtype=torch.float64, device="cpu")))

    @property
    def logsnr_min(self) -> float:
        """Log-SNR at t = 1."""
        return float(self._logsnr(torch.ones((), dtype=torch.float64, device="cpu")))


@dataclass(frozen=True)
class _Bounded(Schedule):
    """Schedules whose time is rescaled to hit the bounds.

    Args:
        min_logsnr: log-SNR at t = 1.
        max_logsnr: log-SNR at t = 0.
    """

    min_logsnr: float = -15.0
    max_logsnr: float = 15.0

    def __post_init__(self) -> None:
        low, high = self.min_logsnr, self.max_logsnr
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"expected finite bounds min_logsnr < max_logsnr, got {low} and {high}")


@dataclass(frozen=True)
class Cosine(_Bounded):
    """(1): the cosine schedule (arXiv:2301.11093, appendix)."""

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.max_logsnr / 2)), math.atan(math.exp(-self.min_logsnr / 2))

    def _angle(self, t: Tensor) -> Tensor:
        first, last = self._ends
        return first + t * (last - first)

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(self._angle(t)))

    def _time(self, logsnr: Tensor) -> Tensor:
        first, last = self._ends
        return (torch.atan(torch.exp(-logsnr / 2)) - first) / (last - first)

    def _derivative(self, t: Tensor) -> Tensor:
        first, last = self._ends
        return -4 * (last - first) / torch.sin(2 * self._angle(t))


@dataclass(frozen=True)
class Shifted(Schedule):
    """(2): `base` as seen at `from_resolution`, for images of `to_resolution` pixels.

    Averaging s x s pixels keeps the signal and divides the noise by s, so an image of d pixels needs
    `2 log(reference / d)` less log-SNR to be as hard as at the reference. The bounds of `base` shift along, as in
    every public implementation. Of images that are not square, d^2 is height times width: what is averaged away is
    an area, whatever its shape, so that equal numbers of pixels are equally hard.

    Args:
        base: the schedule that suits `from_resolution`.
        from_resolution: reference resolution in pixels; 64 and 32 in arXiv:2301.11093.
        to_resolution: resolution of the images in pixels; for h x w pixels sqrt(h w) (`diffzoo.sizes.mean_side`).
    """

    base: Schedule = field(default_factory=Cosine)
    from_resolution: float = 64
    to_resolution: float = 256

    def __post_init__(self) -> None:
        if self.from_resolution <= 0 or self.to_resolution <= 0:
            raise UserError(f"resolutions must be positive, got {self.from_resolution} and {self.to_resolution}")

    @property
    def shift(self) -> float:
        """The offset from the log-SNR of `base`."""
        return 2 * math.log(self.from_resolution / self.to_resolution)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.base._logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.base._time(logsnr - self.shift)

    def _derivative(self, t: Tensor) -> Tensor:
        return self.base._derivative(t)


@dataclass(frozen=True)
class Interpolated(Schedule):
    """(3): from one schedule at the data end to a noisier one at the noise end, linear in t.

    Eq. 6 of arXiv:2301.11093 as printed runs the other way (t times the *less* noisy one). We take the direction of
    the text and of later work of the same group: begin generation under the strong shift, add detail under the weak
    one. It spreads log-SNR more evenly; the printed form does the opposite.

    Args:
        at_data: schedule reached at t = 0, for example shifted from 256.
        at_noise: schedule reached at t = 1, for example shifted from 32; nowhere above `at_data`.
    """

    at_data: Schedule
    at_noise: Schedule

    def __post_init__(self) -> None:
        t = torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu")  # also within `torch.device("meta")`
        if (self.at_noise._logsnr(t) > self.at_data._logsnr(t) + 1e-9).any():
            raise UserError("at_noise must not have more signal than at_data at any time: swap the two schedules")

    def _logsnr(self, t: Tensor) -> Tensor:
        return (1 - t) * self.at_data._logsnr(t) + t * self.at_noise._logsnr(t)

    def _derivative(self, t: Tensor) -> Tensor:
        slopes = (1 - t) * self.at_data._derivative(t) + t * self.at_noise._derivative(t)
        return slopes + self.at_noise._logsnr(t) - self.at_data._logsnr(t)


@dataclass(frozen=True)
class LinearTime(_Bounded):
    """(4): flow matching's schedule, alpha = 1 - t on the straight path."""

    @property
    def _ends(self) -> tuple[float, float]:
        return 1 / (1 + math.exp(self.max_logsnr / 2)), 1 / (1 + math.exp(self.min_logsnr / 2))

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """u = sigma and 1 - u on the straight path; each keeps its digits where it is small."""
        first, last = self._ends
        rest_first, rest_last = 1 / (1 + math.exp(-self.max_logsnr / 2)), 1 / (1 + math.exp(-self.min_logsnr / 2))
        return first + t * (last - first), rest_last + (1 - t) * (rest_first - rest_last)

    def _logsnr(self, t: Tensor) -> Tensor:
        u, rest = self._parts(t)
        return 2 * (rest.log() - u.log())

    def _time(self, logsnr: Tensor) -> Tensor:
        first, last = self._ends
        return (torch.sigmoid(-logsnr / 2) - first) / (last - first)

    def _derivative(self, t: Tensor) -> Tensor:
        first, last = self._ends
        u, rest = self._parts(t)
        return -2 * (last - first) / (u * rest)


@dataclass(frozen=True)
class LinearLogSNR(_Bounded):
    """(8): for networks that were trained over noise levels sigma = exp(-logsnr / 2) without any notion of time.

    The default bounds are those of EDM's samplers, sigma from 0.002 to 80 (arXiv:2206.00364, Table 1).
    """

    min_logsnr: float = -2 * math.log(80)
    max_logsnr: float = -2 * math.log(0.002)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.max_logsnr + t * (self.min_logsnr - self.max_logsnr)

    def _time(self, logsnr: Tensor) -> Tensor:
        return (logsnr - self.max_logsnr) / (self.min_logsnr - self.max_logsnr)

    def _derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.min_logsnr - self.max_logsnr)


@dataclass(frozen=True)
class LinearBeta(Schedule):
    """(5): the VP-SDE with linear beta in continuous time (arXiv:2011.13456, Eq. 32-33).

    The network reads true time, so nothing is rescaled; the log-SNR is capped at `max_logsnr`, which (5) exceeds
    only within t < exp(-max_logsnr) / beta_min of the data.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    max_logsnr: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise UserError(f"expected 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _logsnr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)).clamp_min(math.exp(-self.max_logsnr)))

    def _time(self, logsnr: Tensor) -> Tensor:
        integral = F.softplus(-logsnr)
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))

    def _derivative(self, t: Tensor) -> Tensor:
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -beta / (-torch.expm1(-self._integral(t))).clamp_min(math.exp(-self.max_logsnr))


@dataclass(frozen=True)
class OffsetCosine(Schedule):
    """(6): the cosine schedule of improved DDPM in continuous, true time; score-based code calls it the cosine VP-SDE.

    At t = 1 there is no signal, so log-SNR is capped at +-`max_logsnr`, which it exceeds only within 5e-5 of the
    ends (20). Public samplers start at t = 0.9946 instead.

    Args:
        offset: s; keeps beta from vanishing at the data end.
        max_logsnr: the cap.
    """

    offset: float = 0.008
    max_logsnr: float = 20.0

    def __post_init__(self) -> None:
        if self.offset <= 0:
            raise UserError(f"the offset of the cosine schedule must be positive, got {self.offset}")

    @property
    def _first(self) -> float:
        return self.offset / (1 + self.offset) * math.pi / 2

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.offset) / (1 + self.offset) * math.pi / 2

    def _logsnr(self, t: Tensor) -> Tensor:
        # sigma^2 / alpha^2 = (cos^2 first - cos^2 angle) / cos^2 angle, whose difference loses its digits near t = 0
        angle = self._angle(t)
        ratio = torch.sin(angle - self._first) * torch.sin(angle + self._first) / torch.cos(angle).square()
        return -torch.log(ratio.clamp(math.exp(-self.max_logsnr), math.exp(self.max_logsnr)))

    def _time(self, logsnr: Tensor) -> Tensor:
        tangent = torch.sqrt(torch.exp(-logsnr) + math.sin(self._first) ** 2) / math.cos(self._first)
        return torch.atan(tangent) * 2 / math.pi * (1 + self.offset) - self.offset

    def _derivative(self, t: Tensor) -> Tensor:
        log_alpha_slope = -math.pi / (1 + self.offset) * torch.tan(self._angle(t))  # the slope of 2 log alpha
        return log_alpha_slope * (1 + torch.exp(self._logsnr(t)))


@dataclass(frozen=True)
class DiscreteBetas(Schedule):
    """(7): N noise steps. Step n = 1..N sits at t = n / N; between them log alpha is linear in t.

    Outside the table the end segments are continued (as DPM-Solver does), capped at +-`max_logsnr`.

    Args:
        kind: "linear" in beta (DDPM, arXiv:2006.11239), "scaled_linear" in sqrt(beta) (Stable Diffusion), or
            "cosine" (arXiv:2102.09672, Eq. 17, betas capped at 0.999).
        steps: N.
        beta_start, beta_end: first and last beta of the linear kinds. For "linear" they hold at N = 1000 and scale
            as 1000 / N, as in ADM.
        zero_terminal_snr: shift and scale alpha so that the last step is pure noise and the first stays what it is
            (arXiv:2305.08891, Algorithm 1). Its log-SNR is -`max_logsnr` here, not -infinity. Noise cannot be told from
            data there: predict V.
    """

    kind: BetaKind = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    max_logsnr: float = 20.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, BetaKind)
        if self.steps < 2:
            raise UserError(f"expected at least 2 steps, got {self.steps}")

    @cached_property
    def betas(self) -> Tensor:
        """The N betas, float64 `(N,)`; entry i belongs to step n = i + 1."""
        if not self.zero_terminal_snr:
            return self._plain_betas
        return -torch.expm1(2 * torch.cat([self.log_alpha[:1], self.log_alpha.diff()]))

    @property
    def _plain_betas(self) -> Tensor:
        n = self.steps
        if self.kind == "linear":
            scale = 1000 / n
            return _line(scale * self.beta_start, scale * self.beta_end, n)
        if self.kind == "scaled_linear":
            return _line(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        u = _line(0, n, n + 1) / n
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)

    @cached_property
    def log_alpha(self) -> Tensor:
        """log alpha at steps 1..N, float64 `(N,)`: half the sum of log(1 - beta)."""
        plain = torch.log1p(-self._plain_betas).cumsum(0) / 2
        if not self.zero_terminal_snr:
            return plain
        alpha = plain.exp()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return alpha.log().clamp_min(-0.5 * math.log1p(math.exp(self.max_logsnr)))

    @cached_property
    def _log_alpha_from_data(self) -> Tensor:
        """log alpha at steps 0..N."""
        return torch.cat([self.log_alpha.new_zeros(1), self.log_alpha])

    def snap(self, t: Times) -> Times:
        """The step at or after each time: uniform times in [0, 1] become the N steps, equally often."""
        # a step's own time, rounded to float32, stays that step
        return ((_precise(t) * self.steps - 1e-3).ceil().clamp(1, self.steps) / self.steps).to(t.dtype)

    def log_alpha_at(self, t: Times) -> PerSample:
        """log alpha at times `t` of any shape, float64; linear between steps, exactly 0 at t = 0, and not capped."""
        position = _precise(t) * self.steps
        table = on_device(self._log_alpha_from_data, position)
        left = position.floor().long().clamp(0, self.steps - 1)
        return table[left] + (position - left) * (table[left + 1] - table[left])

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha at t, no larger than `max_logsnr` allows, and its slope in t."""
        table = on_device(self.log_alpha, t)
        left = (t * self.steps - 1).floor().long().clamp(0, self.steps - 2)
        slope = (table[left + 1] - table[left]) * self.steps
        # integers divided by integers would be float32
        log_alpha = table[left] + slope * (t - (left + 1).to(t.dtype) / self.steps)
        return log_alpha.clamp_max(-0.5 * math.log1p(math.exp(-self.max_logsnr))), slope

    def _logsnr(self, t: Tensor) -> Tensor:
        log_alpha, _ = self._segment(t)
        return (2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))).clamp_min(-self.max_logsnr)

    def _time(self, logsnr: Tensor) -> Tensor:
        wanted = -0.5 * F.softplus(-logsnr)
        table = on_device(self.log_alpha, wanted)
        left = ((table > wanted[..., None]).sum(-1) - 1).clamp(0, self.steps - 2)  # exports have no searchsorted
        slope = (table[left + 1] - table[left]) * self.steps
        return (left + 1).to(wanted.dtype) / self.steps + (wanted - table[left]) / slope

    def _derivative(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._segment(t)
        return 2 * slope / -torch.expm1(2 * log_alpha)
