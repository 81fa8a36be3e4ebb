"""Heun's method in t, for networks of flow matching.

The probability-flow ODE in t is

    (1)  dz / dt = alpha' x_hat + sigma' eps_hat

`Heun` of `edm.py` steps in sigma / alpha, which is infinite where a straight path has no signal; in t the velocity is
finite there. Networks that predict x on the straight path divide by t to get the velocity (x_hat - z) / t; JiT divides
by t = 0.05 at least, in training and in sampling (arXiv:2511.13720), so its last steps are shorter than (1) says.
"""

from dataclasses import dataclass

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.sampling.samplers import Denoised, Final, Noise, Sampler, node
from diffzoo.typing import Data, Time

__all__ = ["FlowHeun"]


@dataclass(frozen=True)
class FlowHeun(Sampler):
    """Heun's method (explicit trapezoid) on (1), two network calls per step.

    Args:
        floor: times below this count as this one where the velocity is divided by t; 0 = (1) as it stands, JiT 0.05.
        euler_end: the last step is Euler's, so that the network never sees the data end.
    """

    final: Final = "state"
    floor: float = 0.0
    euler_end: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor < 1:
            raise UserError(f"floor: expected a time in [0, 1), got {self.floor}")

    @property
    def calls(self) -> int:
        """Network calls for one image."""
        short = self.euler_end or self.final == "x_hat"
        return 2 * self.steps - short + (self.final == "denoise")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, int]:
        """One step; `memory` counts them."""
        number = memory if isinstance(memory, int) else 0
        first = self._velocity(denoise, z, t)
        guess = z + (s - t) * first
        if number == self.steps - 1 and self.euler_end:
            return guess, self.steps
        return z + (s - t) / 2 * (first + self._velocity(denoise, guess, s)), number + 1

    def _velocity(self, denoise: Denoised, z: Tensor, t: Tensor) -> Tensor:
        a, slope = node(denoise.process, t), denoise.process.schedule.derivative(t)
        d_alpha, d_sigma = denoise.process.derivatives_at(a.logsnr)
        x, eps, _ = denoise(z, t)
        damping = 1.0 if t >= self.floor else t / self.floor
        return damping * slope * (d_alpha * x + d_sigma * eps)
