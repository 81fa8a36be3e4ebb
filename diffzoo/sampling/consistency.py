"""Sampling of consistency models (arXiv:2303.01469, Algorithm 1): jump to the data, add noise again, jump again.

With f the network's x_hat, which is exact at the least noise level sigma_0, and noise levels sigma_1 > sigma_2 > ...

    x = f(sigma_1 eps),    then    x = f(x + sqrt(sigma_n^2 - sigma_0^2) eps')  for n = 2, 3, ...

One step is one network call.
"""

from dataclasses import dataclass, field

import torch

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.sampling.grids import Grid, Karras
from diffzoo.sampling.samplers import Denoised, Noise, Sampler, node
from diffzoo.typing import Data, Time, Times

__all__ = ["KarrasStops", "MultistepConsistency"]


@dataclass(frozen=True)
class KarrasStops(Karras):
    """Some of the noise levels of a longer `Karras` grid, then its end.

    The published two-step samplers stop at 0 and 22 of 40 levels, for example.

    Args:
        levels: number of levels of the longer grid, both ends counted.
        stops: which of them, ascending from 0 (the noise end); as many as the sampler's steps.
    """

    levels: int = 40
    stops: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stops", tuple(self.stops))
        ascending = all(a < b for a, b in zip(self.stops, (*self.stops[1:], self.levels - 1), strict=True))
        if not self.stops or self.stops[0] < 0 or not ascending:
            raise UserError(f"stops: expected ascending numbers from 0 to {self.levels - 2}, got {list(self.stops)}")

    def times(self, process: GaussianProcess, steps: int) -> Times:
        """Decreasing times, float64 `(steps + 1,)`.

        Raises:
            UserError: unless there are as many stops as steps.
        """
        if steps != len(self.stops):
            raise UserError(f"this grid has {len(self.stops)} stops, got steps={steps}: set steps to it")
        return super().times(process, self.levels - 1)[[*self.stops, -1]]


@dataclass(frozen=True)
class MultistepConsistency(Sampler):
    """Algorithm 1 of arXiv:2303.01469; one step of it is the plain consistency function.

    sigma_0 is the noise level of the schedule's data end. On a network that is no consistency model this is
    "predict and add noise again", which has no order of convergence.
    """

    steps: int = 1
    grid: Grid = field(default_factory=KarrasStops)
    clip: float | None = 1.0

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        end, b = node(denoise.process, torch.zeros_like(s)), node(denoise.process, s)
        kept = (b.alpha * end.sigma / end.alpha).square()
        added = (b.sigma.square() - kept).clamp_min(0).sqrt()
        return b.alpha * denoise(z, t).x + added * noise.normal(z.shape[1:]).to(z), None
