"""Samplers of discrete chains: ADM's respaced ancestral sampling and DDIM.

Both walk over kept steps of a table of betas (`diffzoo.process.discrete`); the network reads the original index of each
step. `Respaced` is the grid, so any sampler can use it; `RespacedDDIM` is DDIM with ADM's grid and clipping, and
`RespacedAncestral` samples with the variance that the network has learned.

    ADM's paper           here
    250 sampling steps    RespacedAncestral(steps=250)
    "90,60,60,20,20"      RespacedAncestral(steps=250, grid=Respaced(respacing="90,60,60,20,20"))
    "ddim25"              RespacedDDIM(steps=25)
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.process.discrete import ReverseVariance, discrete_schedule, kept_steps, reverse_moments, reverse_step
from diffzoo.process.gaussian import Estimate, GaussianProcess
from diffzoo.sampling.grids import Grid
from diffzoo.sampling.samplers import DDIM, Denoised, Final, Noise, Sampler
from diffzoo.typing import Data, Time, Times

__all__ = ["Respaced", "RespacedAncestral", "RespacedDDIM"]


@dataclass(frozen=True)
class Respaced(Grid):
    """Kept steps of a discrete chain, then the data at t = 0.

    `t_start` and `t_end` are not used: the chain has its own. With "ddim25" of 1000 steps that is index 960,
    whose noise level is close to, but not, pure noise; sampling starts there from pure noise all the same, as ADM does.

    Args:
        respacing: "even": the sampler's number of steps over the whole range, both ends kept. "ddim": a whole stride
            from index 0. Or a respacing with its own counts: "250", "90,60,60,20,20", "ddim25"
            (`diffzoo.process.discrete.kept_steps`), which must be as many as the sampler's steps.
    """

    respacing: str = "even"

    def times(self, process: GaussianProcess, steps: int) -> Times:
        """Decreasing times, float64 `(steps + 1,)`.

        Raises:
            UserError: for a process without a table, or counts that no respacing gives.
        """
        length = discrete_schedule(process).steps
        kept = kept_steps({"even": str(steps), "ddim": f"ddim{steps}"}.get(self.respacing, self.respacing), length)
        if len(kept) != steps:
            raise UserError(
                f"the respacing {self.respacing!r} keeps {len(kept)} steps, got steps={steps}: set steps to it"
            )
        indices = torch.tensor(kept[::-1], dtype=torch.float64)
        return torch.cat([(indices + 1) / length, indices.new_zeros(1)])

    def _between(self, process: GaussianProcess, u: Tensor) -> Tensor:
        return self.times(process, len(u) - 1)


@dataclass(frozen=True)
class RespacedDDIM(DDIM):
    """DDIM on a whole stride of a discrete chain, with x_hat clamped to [-1, 1] (ADM's "ddim25")."""

    steps: int = 25
    grid: Grid = field(default_factory=lambda: Respaced(respacing="ddim"))
    clip: float | None = 1.0


@dataclass(frozen=True)
class RespacedAncestral(Sampler):
    """Samples the model's reverse step, with mean and variance as in `diffzoo.process.discrete.reverse_moments`.

    Classifier guidance moves the mean by variance times score, after clipping (arXiv:2105.05233, Algorithm 1).

    Args:
        variance: "learned" for networks that have learned it; "fixed_large" or "fixed_small" for others.
    """

    steps: int = 250
    grid: Grid = field(default_factory=Respaced)
    clip: float | None = 1.0
    final: Final = "state"
    variance: ReverseVariance = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("learned", "fixed_large", "fixed_small")
        if self.variance not in known:
            raise UserError(f"unknown variance {self.variance!r}{did_you_mean(self.variance, known)}")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, Time]:
        """One step; `memory` is the logarithm of the last step's variance, which the very last one inherits."""
        schedule = discrete_schedule(denoise.process)
        last = memory if isinstance(memory, Tensor) else None
        step = reverse_step(schedule.log_alpha_at(t), schedule.log_alpha_at(s), last)
        estimate, score = _parts(denoise, z, t)
        moments = reverse_moments(step, estimate, z, self.variance)
        mean = moments.mean if score is None else moments.mean + moments.variance * score
        if s > 0:
            mean = mean + torch.exp(0.5 * moments.log_variance) * noise.normal(z.shape[1:]).to(z)
        return mean, step.log_variance


def _parts(denoise: Denoised, z: Tensor, t: Tensor) -> tuple[Estimate, Tensor | None]:
    split = getattr(denoise, "parts", None)
    parts: tuple[Estimate, Tensor | None] = split(z, t) if split else (denoise(z, t), None)
    return parts
