"""Ancestral samplers of second order: a step of DPM-Solver++ to less noise than wanted, then noise makes up for it.

In y = z / alpha with r = sigma / alpha, a step from r_t to r_s keeps every marginal if it goes down to

    (1)  r_down^2 = r_s^2 - r_up^2,    r_up = eta r_s sqrt(1 - r_s^2 / r_t^2),

and adds noise of standard deviation r_up. eta = 1 is the variance of the Gaussian posterior; with a step of first order
this is `DDIM(eta=1)`, k-diffusion's euler_ancestral.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.sampling.grids import Grid, UniformLogSNR
from diffzoo.sampling.samplers import Denoised, Noise, Sampler, node
from diffzoo.typing import Data, Time

__all__ = ["DPMSolverAncestral", "DPMSolverSDE"]


@dataclass(frozen=True)
class _SecondOrder(Sampler):
    """Two network calls per step, the second at a node inside it.

    Args:
        eta: 1 for the noise of the reverse process, 0 for none.
    """

    grid: Grid = field(default_factory=UniformLogSNR)
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie in [0, 1], got {self.eta}")

    @property
    def calls(self) -> int:
        return 2 * self.steps + {"x_hat": -1, "state": 0, "denoise": 1}[self.final]

    def _split(self, r_t: Time, r_s: Time) -> tuple[Time, Time]:
        """(r_down, r_up) of (1)."""
        up = self.eta * r_s * (1 - (r_s / r_t).square()).sqrt()
        return (r_s.square() - up.square()).sqrt(), up


@dataclass(frozen=True)
class DPMSolverAncestral(_SecondOrder):
    """k-diffusion's dpmpp_2s_ancestral: DPM-Solver++(2S) down to r_down, then noise."""

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        process = denoise.process
        a, b = node(process, t), node(process, s)
        r, (down, up) = a.sigma / a.alpha, self._split(a.sigma / a.alpha, b.sigma / b.alpha)
        middle = process.schedule.time(-torch.log(r * down))  # halfway in log r
        m, y = node(process, middle), z / a.alpha
        r_m = (r * down).sqrt()
        inner = denoise(m.alpha * (r_m / r * y + (1 - r_m / r) * denoise(z, t).x), middle).x
        y = down / r * y + (1 - down / r) * inner
        return b.alpha * (y + (up * noise.normal(z.shape[1:]).to(z) if self.eta else 0)), None


@dataclass(frozen=True)
class DPMSolverSDE(_SecondOrder):
    """k-diffusion's dpmpp_sde: both the inner node, halfway in log-SNR, and the end are reached with noise.

    The noise of the whole step contains that of its first part: both are increments of one Brownian motion in r.
    Independent draws would converge with order 1.
    """

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        process = denoise.process
        a, b = node(process, t), node(process, s)
        middle = process.schedule.time((a.logsnr + b.logsnr) / 2)
        m, y = node(process, middle), z / a.alpha
        r, r_m, r_b = (n.sigma / n.alpha for n in (a, m, b))
        first = noise.normal(z.shape[1:]).to(z)
        share = (r - r_m) / (r - r_b)
        whole = share.sqrt() * first + (1 - share).sqrt() * noise.normal(z.shape[1:]).to(z)

        def reach(end: Tensor, estimate: Tensor, draw: Tensor) -> Tensor:
            down, up = self._split(r, end)
            return down / r * y + (1 - down / r) * estimate + up * draw

        inner = denoise(m.alpha * reach(r_m, denoise(z, t).x, first), middle).x
        return b.alpha * reach(r_b, inner, whole), None
