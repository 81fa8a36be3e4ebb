"""Methods of Euler and Heun, in two coordinates.

In y = z / alpha with the noise level r = sigma / alpha as time, the probability-flow ODE is

    (1)  dy / dr = eps_hat                                         (arXiv:2206.00364, Eq. 1 with s = 1)

on every path; `Heun` and EDM's churn live there. In t, with f = alpha' / alpha and g^2 = -sigma^2 logsnr'(t), it is

    (2)  dz / dt = alpha' x_hat + sigma' eps_hat                   the flow; the ODE
    (3)  dz = (alpha' x_hat + sigma' eps_hat + D eps_hat / sigma) dt + sqrt(2 D) dw,   run backwards; the SDE

for any diffusion D(t) >= 0: noise and drift balance, and every marginal stays what it is (arXiv:2401.08740, section
2.2). D = g^2 / 2 is the time reversal of the forward process.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.sampling.grids import Grid, Karras
from diffzoo.sampling.samplers import Denoised, Final, Noise, Sampler, node

__all__ = ["Euler", "EulerMaruyama", "Heun"]


@dataclass(frozen=True)
class Heun(Sampler):
    """EDM's sampler: Heun's method on (1), two network calls per step, with optional churn (arXiv:2206.00364, Alg. 2).

    EDM's N steps, the last of which goes to zero noise, are `steps = N - 1` with final "denoise": 2 N - 1 calls.

    Args:
        churn: S_churn; how much noise is added and removed again, over all steps. 0 = deterministic.
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

    @property
    def calls(self) -> int:
        return 2 * self.steps + {"x_hat": -1, "state": 0, "denoise": 1}[self.final]

    def step(self, denoise: Denoised, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise) -> tuple[Tensor, Any]:
        if self.churn:
            z, t = self._churned(denoise, z, t, noise)
        a, b = node(denoise.process, t), node(denoise.process, s)
        dr = b.sigma / b.alpha - a.sigma / a.alpha
        slope = denoise(z, t).eps
        guess = b.alpha * (z / a.alpha + dr * slope)
        return b.alpha * (z / a.alpha + dr / 2 * (slope + denoise(guess, s).eps)), None

    def _churned(self, denoise: Denoised, z: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Add noise, and the time at which there is as much; not beyond the noise end of the schedule."""
        process = denoise.process
        a = node(process, t)
        r = a.sigma / a.alpha
        if not self.churn_min <= r <= self.churn_max:
            return z, t
        noisier = r * (1 + min(self.churn / self.steps, math.sqrt(2) - 1))
        later = process.schedule.time(-2 * torch.log(noisier)).clamp_max(1)
        b = node(process, later)
        added = ((b.sigma / b.alpha).square() - r.square()).clamp_min(0).sqrt() * self.churn_noise
        # drawn even where the end of the schedule leaves nothing to add: the count of draws then depends on t alone
        return b.alpha * (z / a.alpha + added * noise.normal(z.shape[1:]).to(z)), later


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on (2), in t. On flow matching's schedule and path it is DDIM; elsewhere DDIM is more exact."""

    def step(self, denoise: Denoised, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise) -> tuple[Tensor, Any]:
        a = node(denoise.process, t)
        x, eps, _ = denoise(z, t)
        slope = denoise.process.schedule.derivative(t)
        d_alpha, d_sigma = denoise.process.derivatives_at(a.logsnr)
        return z + (s - t) * slope * (d_alpha * x + d_sigma * eps), None


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler and Maruyama's method on (3), in t.

    The last step of a grid that ends at t = 0 adds no noise, as in the public code of U-ViT.

    Args:
        diffusion: "process" for D = g^2 / 2, the reverse SDE (arXiv:2011.13456); "sigma" for D = sigma / 2, which
            stays finite at the noise end of flow matching, where g^2 does not (arXiv:2401.08740).
        strength: factor on D.
    """

    diffusion: Literal["process", "sigma"] = "process"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion not in ("process", "sigma"):
            raise UserError(f"expected diffusion 'process' or 'sigma', got {self.diffusion!r}")
        if self.strength < 0:
            raise UserError(f"the strength of the diffusion must not be negative, got {self.strength}")

    def step(self, denoise: Denoised, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise) -> tuple[Tensor, Any]:
        a = node(denoise.process, t)
        x, eps, _ = denoise(z, t)
        slope = denoise.process.schedule.derivative(t)
        d_alpha, d_sigma = denoise.process.derivatives_at(a.logsnr)
        intensity = -a.sigma.square() * slope if self.diffusion == "process" else a.sigma
        intensity = self.strength * intensity  # 2 D
        drift = slope * d_alpha * x + (slope * d_sigma + intensity / (2 * a.sigma)) * eps
        z = z + (s - t) * drift
        if s > 0:
            z = z + ((t - s) * intensity).sqrt() * noise.normal(z.shape[1:]).to(z)
        return z, None
