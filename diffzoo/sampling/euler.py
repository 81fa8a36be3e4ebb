"""Methods of Euler in t. With f = alpha' / alpha and g^2 = -sigma^2 logsnr'(t), the flow and the SDE are

    (1)  dz / dt = alpha' x_hat + sigma' eps_hat                   the flow; the ODE
    (2)  dz = (alpha' x_hat + sigma' eps_hat + D eps_hat / sigma) dt + sqrt(2 D) dw,   run backwards; the SDE

for any diffusion D(t) >= 0: noise and drift balance, and every marginal stays what it is (arXiv:2401.08740, section
2.2). D = g^2 / 2 is the time reversal of the forward process.
"""

from dataclasses import dataclass
from typing import Literal

from diffzoo.errors import UserError, check_choice
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.process.table import tabulated
from diffzoo.sampling.samplers import Denoised, Noise, Sampler, node
from diffzoo.typing import Data, Time

__all__ = ["Euler", "EulerMaruyama"]

Diffusion = Literal["process", "sigma"]


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on (1), in t. On flow matching's schedule and path it is DDIM; elsewhere DDIM is more exact."""

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
        x, eps, _ = denoise(z, t)
        change, d_alpha, d_sigma = _euler_weights(denoise.process, t, s)
        return z + change * (d_alpha * x + d_sigma * eps), None


@tabulated
def _euler_weights(process: GaussianProcess, t: Time, s: Time) -> tuple[Time, Time, Time]:
    """The change of log-SNR in an Euler step, and the derivatives of alpha and sigma in it."""
    return (s - t) * process.schedule.derivative(t), *process.derivatives_at(node(process, t).logsnr)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler and Maruyama's method on (2), in t.

    The last step of a grid that ends at t = 0 adds no noise, as in the public code of U-ViT.

    Args:
        diffusion: "process" for D = g^2 / 2, the reverse SDE (arXiv:2011.13456); "sigma" for D = sigma / 2, which
            stays finite at the noise end of flow matching, where g^2 does not (arXiv:2401.08740).
        strength: factor on D.
    """

    diffusion: Diffusion = "process"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("diffusion", self.diffusion, Diffusion)
        if self.strength < 0:
            raise UserError(f"the strength of the diffusion must not be negative, got {self.strength}")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, None]:
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
