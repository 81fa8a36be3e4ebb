"""Samplers: how to go from z at time t to z at a smaller time s, given a denoiser.

A sampler is a frozen dataclass with one method, `step`. It needs of the process no more than log-SNR, alpha and sigma
at two times, so each is written once and is valid on every path: its images on the variance-preserving, straight and
variance-exploding path differ only by the factor between those paths. This file has the contract and the samplers
that follow from the Gaussian posterior; `dpm_solver.py` and `multistep.py` have the exponential integrators,
`ancestral_solvers.py` their ancestral kin, `edm.py` and `euler.py` those that step in sigma / alpha and in t.

With c = exp(logsnr_t - logsnr_s) < 1 the posterior of the forward process is

    (1)  q(z_s | z_t, x) = N(c (alpha_s / alpha_t) z_t + (1 - c) alpha_s x,  (1 - c) sigma_s^2 I)

(arXiv:2107.00630, appendix A; arXiv:2301.11093, appendix).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

from diffzoo.errors import UserError, check_choice
from diffzoo.process.gaussian import Estimate, GaussianProcess, expand_like
from diffzoo.process.table import tabulated
from diffzoo.sampling.grids import Grid, UniformTime
from diffzoo.typing import Data, Time, Times

__all__ = ["DDIM", "AdjustedDDIM", "Ancestral", "Denoised", "Final", "Node", "Noise", "Sampler", "Steps", "node"]

Final = Literal["x_hat", "denoise", "state"]
MOST_STEPS = 1_000_000


@runtime_checkable
class Denoised(Protocol):
    """The denoiser that `step` calls: its condition and clipping are already bound."""

    process: GaussianProcess

    def __call__(self, z: Data, t: Times) -> Estimate: ...


@runtime_checkable
class Noise(Protocol):
    """A source of standard normal noise, image by image; `diffzoo.rng.ImageNoise` is the usual one."""

    def normal(self, shape: Sequence[int]) -> Data: ...


class Node(NamedTuple):
    """A time and the process at that time; each a float64 tensor `()` on the CPU."""

    t: Time
    logsnr: Time
    alpha: Time
    sigma: Time


@tabulated
def node(process: GaussianProcess, t: Time) -> Node:
    """The process at time `t`."""
    logsnr = process.logsnr(t)
    return Node(t, logsnr, *process.coefficients_at(logsnr))


@runtime_checkable
class Steps(Protocol):
    """The interface that the loop needs: that of `Sampler`, or of a wrapper around one."""

    @property
    def clip(self) -> float | None: ...

    @property
    def final(self) -> Final: ...

    def times(self, process: GaussianProcess) -> Times: ...

    def step(
        self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise
    ) -> tuple[Data, object]: ...

    def finish(self, denoise: Denoised, z: Data, t: Time, noise: Noise) -> Data: ...


@dataclass(frozen=True)
class Sampler(ABC):
    """The contract.

    Args:
        steps: number of steps; their cost is `calls`.
        grid: where to stop.
        clip: clamp every x_hat to [-clip, clip], with eps recomputed to fit z. Set 1.0 for images in [-1, 1], where
            it helps at high noise and with guidance; leave None for latents, which have no bounds, and where a solver's
            order matters, since a clamp is not smooth.
        final: how the last step ends.
            "x_hat": it goes to zero noise, that is, it returns the last x_hat. No image keeps the
            noise of the schedule's end, and it costs nothing: the usual choice of ancestral and DDIM code.
            "denoise": it goes to the end of the grid, and one more call there removes the rest of the noise (EDM).
            "state": it returns z at the end of the grid, as the public U-ViT and DiMR samplers do.
    """

    steps: int = 50
    grid: Grid = field(default_factory=UniformTime)
    clip: float | None = None
    final: Final = "x_hat"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            bound = "at least 1 step" if self.steps < 1 else f"at most {MOST_STEPS:,} steps"
            raise UserError(f"a sampler needs {bound}, got {self.steps}")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"clip must be positive, got {self.clip}: leave it out for no clipping")
        check_choice("final", self.final, Final)

    @property
    def calls(self) -> int:
        """Network calls for one image, before guidance multiplies them."""
        return self.steps + (self.final == "denoise")

    def times(self, process: GaussianProcess) -> Times:
        """The times at which steps begin and end, float64, strictly decreasing."""
        return self.grid.times(process, self.steps)

    @abstractmethod
    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, object]:
        """From z at `t` to z at `s` < `t`.

        Args:
            denoise: estimates data and noise.
            z: the state `(b, ...)`.
            t, s: times, float64 `()`.
            memory: what the last step returned beside z; None at the start. Multistep methods keep old estimates here.
            noise: where random draws come from; a deterministic sampler draws none.
        """

    def finish(self, denoise: Denoised, z: Data, t: Time, noise: Noise) -> Data:
        """From z at `t` to zero noise in one network call: x_hat."""
        return denoise(z, t).x


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Samples (1) with x_hat for x, and a variance between its two bounds.

    The true reverse variance lies between that of (1), right if the data were known, and `1 - c` times the noise
    variance at t, right if they were white noise. `gamma` interpolates their logarithms (arXiv:2301.11093: 0.2 on
    ImageNet, 1.0 on MS-COCO); 0 and 1 are the two choices of DDPM (arXiv:2006.11239). The upper bound is stated for
    the variance-preserving path and scaled to the others, so that all give the same images.
    """

    gamma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma must lie in [0, 1], got {self.gamma}")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        a, b = node(denoise.process, t), node(denoise.process, s)
        mean = posterior_mean(a, b, z, denoise(z, t).x)
        return mean + _posterior_deviation(a, b, self.gamma) * noise.normal(z.shape[1:]).to(z), None


def posterior_mean(a: Node, b: Node, z: Data, x: Data) -> Data:
    """The mean of (1) for a step from node `a` to node `b`."""
    of_z, of_x = _posterior_weights(a, b)
    return of_z * z - of_x * x


@tabulated
def _posterior_weights(a: Node, b: Node) -> tuple[Time, Time]:
    """The weights of z and x in the mean of (1), the latter with the opposite sign."""
    keep = torch.exp(a.logsnr - b.logsnr)
    return keep * (b.alpha / a.alpha), torch.expm1(a.logsnr - b.logsnr) * b.alpha


@tabulated
def _posterior_deviation(a: Node, b: Node, gamma: float) -> Time:
    """The standard deviation between the two bounds, see `Ancestral`."""
    lower = b.sigma.square()
    upper = torch.sigmoid(-a.logsnr) * (b.alpha.square() + b.sigma.square())
    variance = -torch.expm1(a.logsnr - b.logsnr) * lower ** (1 - gamma) * upper**gamma
    return variance.sqrt()


@dataclass(frozen=True)
class DDIM(Sampler):
    """Keep the estimated data and noise, mix them anew: `z_s = alpha_s x_hat + sigma_s eps_hat` (arXiv:2010.02502).

    First order. On the straight path this is Euler's method for the flow. With `eta` > 0 a part of the estimated
    noise is replaced by fresh noise, of `eta` times the standard deviation of (1); eta = 1 is DDPM.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie in [0, 1], got {self.eta}")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        a, b = node(denoise.process, t), node(denoise.process, s)
        x, eps, _ = denoise(z, t)
        if self.eta == 0:
            return b.alpha * x + b.sigma * eps, None
        fresh = -torch.expm1(a.logsnr - b.logsnr) * self.eta**2  # share of the noise variance at s that is drawn anew
        kept = b.sigma * (1 - fresh).sqrt()
        return b.alpha * x + kept * eps + b.sigma * fresh.sqrt() * noise.normal(z.shape[1:]).to(z), None


@dataclass(frozen=True)
class AdjustedDDIM(Sampler):
    """aDDIM, the deterministic sampler of the Simple-Diffusion group (arXiv:2403.06807, section 3.2, Algorithm 3).

    Had x been drawn from its posterior given z_t, DDIM's next z would scatter around what DDIM returns with variance
    `(alpha_s - alpha_t sigma_s / sigma_t)^2 Var[x | z_t]`. DDIM leaves that out, which makes its images too smooth;
    here eps_hat is stretched until z_s has the norm it should have. The posterior variance is taken to be `strength`
    times that of independent Gaussian pixels of variance `prior_variance`. The extra term is of second order in the
    step, so with many steps this becomes DDIM.
    """

    strength: float = 0.1
    prior_variance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0 or self.prior_variance <= 0:
            raise UserError(
                f"expected strength >= 0 and prior_variance > 0, got {self.strength} and {self.prior_variance}"
            )

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        a, b = node(denoise.process, t), node(denoise.process, s)
        x, eps, _ = denoise(z, t)
        posterior = self.strength / (1 / self.prior_variance + torch.exp(a.logsnr))
        missing = (b.alpha - a.alpha * b.sigma / a.sigma).square() * posterior
        mean_square = expand_like(eps.flatten(1).square().mean(1), z)
        return b.alpha * x + (b.sigma.square() + missing / mean_square).sqrt() * eps, None
