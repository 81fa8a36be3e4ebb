"""Samplers in the noise level r = sigma / alpha of y = z / alpha, where the probability-flow ODE is

    (1)  dy / dr = eps_hat                                         (arXiv:2206.00364, Eq. 1 with s = 1)

on every path. EDM's churn adds noise before a step and lets the step remove it again (Algorithm 2).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from diffzoo.errors import UserError
from diffzoo.process.table import tabulated
from diffzoo.sampling.exponential import weights
from diffzoo.sampling.grids import Grid, Karras
from diffzoo.sampling.samplers import Denoised, Final, Node, Noise, Sampler, node
from diffzoo.typing import Data, Time

__all__ = ["DPM2", "LMS", "Churned", "EDMEuler", "Heun"]


def _level(n: Node) -> Time:
    return n.sigma / n.alpha


@tabulated
def _level_step(a: Node, b: Node) -> tuple[Time, Time]:
    """The step in sigma / alpha from node `a` to node `b`, and half of it."""
    dr = _level(b) - _level(a)
    return dr, dr / 2


@dataclass(frozen=True)
class Churned(Sampler):
    """Samplers with churn (arXiv:2206.00364, Algorithm 2).

    EDM's N steps, the last of which goes to zero noise, are `steps = N - 1` with final "denoise".

    Args:
        churn: S_churn; how much noise is added and removed again, over all N steps. 0 = deterministic.
        churn_min, churn_max: S_tmin and S_tmax; where, in sigma / alpha.
        churn_noise: S_noise; the standard deviation of the noise added.
    """

    grid: Grid = field(default_factory=Karras)
    final: Final = "denoise"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.churn < 0 or self.churn_noise <= 0:
            raise UserError(f"expected churn >= 0 and churn_noise > 0, got {self.churn} and {self.churn_noise}")

    def finish(self, denoise: Denoised, z: Data, t: Time, noise: Noise) -> Data:
        z, t = self.churned(denoise, z, t, noise)
        return denoise(z, t).x

    def churned(self, denoise: Denoised, z: Data, t: Time, noise: Noise) -> tuple[Data, Time]:
        """Add noise, and the time at which there is as much; not beyond the noise end of the schedule."""
        process = denoise.process
        if not self.churn:
            return z, t
        a = node(process, t)
        r = _level(a)
        if not self.churn_min <= r <= self.churn_max:
            return z, t
        count = self.steps + (self.final == "denoise")  # the last step, to zero noise, is one of EDM's N
        noisier = r * (1 + min(self.churn / count, math.sqrt(2) - 1))
        later = process.schedule.time(-2 * torch.log(noisier)).clamp_max(1)
        b = node(process, later)
        added = (_level(b).square() - r.square()).clamp_min(0).sqrt() * self.churn_noise
        # drawn even where the end of the schedule leaves nothing to add: the count of draws then depends on t alone
        return b.alpha * (z / a.alpha + added * noise.normal(z.shape[1:]).to(z)), later


@dataclass(frozen=True)
class EDMEuler(Churned):
    """Euler's method on (1), with churn; without it this is DDIM."""

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        z, t = self.churned(denoise, z, t, noise)
        b = node(denoise.process, s)
        x, eps, _ = denoise(z, t)
        return b.alpha * x + b.sigma * eps, None


class _TwoCalls(Churned):
    """Two network calls per step, and one for the last step to zero noise: 2 N - 1 for EDM's N steps."""

    @property
    def calls(self) -> int:
        return 2 * self.steps + {"x_hat": -1, "state": 0, "denoise": 1}[self.final]


@dataclass(frozen=True)
class Heun(_TwoCalls):
    """EDM's sampler: Heun's method on (1), with optional churn (arXiv:2206.00364, Algorithm 2). Second order."""

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        z, t = self.churned(denoise, z, t, noise)
        a, b = node(denoise.process, t), node(denoise.process, s)
        dr, half = _level_step(a, b)
        slope = denoise(z, t).eps
        start = z / a.alpha
        guess = b.alpha * (start + dr * slope)
        return b.alpha * (start + half * (slope + denoise(guess, s).eps)), None


@dataclass(frozen=True)
class DPM2(_TwoCalls):
    """The midpoint method on (1), the middle taken in log-SNR, with churn; k-diffusion's dpm_2. Second order."""

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        z, t = self.churned(denoise, z, t, noise)
        process = denoise.process
        a, b = node(process, t), node(process, s)
        middle = process.schedule.time((a.logsnr + b.logsnr) / 2)
        m = node(process, middle)
        guess = m.alpha * (z / a.alpha + (_level(m) - _level(a)) * denoise(z, t).eps)
        return b.alpha * (z / a.alpha + (_level(b) - _level(a)) * denoise(guess, middle).eps), None


class _Slopes(NamedTuple):
    """Noise levels sigma / alpha and the noise estimates there, newest first."""

    past: tuple[tuple[Time, Data], ...]


@dataclass(frozen=True)
class LMS(Sampler):
    """Adams and Bashforth's linear multistep method on (1): one network call per step.

    The polynomial in r goes through the noise estimates of this and the steps before, so the first steps have a lower
    order.

    Args:
        order: 1 to 4.
    """

    grid: Grid = field(default_factory=Karras)
    order: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3, 4):
            raise UserError(f"LMS has orders 1 to 4, got {self.order}")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, _Slopes]:
        a, b = node(denoise.process, t), node(denoise.process, s)
        before = memory.past if isinstance(memory, _Slopes) else ()
        past = ((_level(a), denoise(z, t).eps), *before)[: self.order]
        dr = _level(b) - _level(a)
        nodes = torch.stack([(r - _level(a)) / dr for r, _ in past])
        found = weights(nodes, 1 / torch.arange(1, len(past) + 1, dtype=nodes.dtype))
        total = sum(w * slope for w, (_, slope) in zip(found, past, strict=True))
        return b.alpha * (z / a.alpha + dr * total), _Slopes(past)
