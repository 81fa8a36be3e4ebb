"""The Gaussian diffusion process: one owner for schedule, path, prediction and what the network reads.

Conventions, the same in every file of diffzoo:

    x        clean data, in [-1, 1] (images) or of unit variance (latents)
    eps      standard normal noise
    t        time in [0, 1]: 0 = data, 1 = noise; sampling goes from t to a smaller s
    logsnr   log(alpha^2 / sigma^2), decreasing in t

    (1)  z = alpha(t) x + sigma(t) eps                     (arXiv:2301.11093, Eq. 1)
    (2)  out = a x + b eps                                 what the network is trained to say (`predictions.py`)
    (3)  x_hat = (b z - sigma out) / D,  eps_hat = (alpha out - a z) / D,  D = alpha b - sigma a

Tensors are batch first. Per-sample scalars have shape `(b,)`, or `()` for a whole batch at one time, and broadcast
through `expand_like`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.noise_conditioning import LogSNRConditioning, NoiseConditioning
from diffzoo.process.paths import Path, VariancePreserving
from diffzoo.process.predictions import Eps, Prediction, V
from diffzoo.process.schedules import Cosine, Schedule

__all__ = ["Estimate", "GaussianProcess", "expand_like"]


class Estimate(NamedTuple):
    """What a denoiser believes: clean data and noise, consistent with z by (1).

    `variance` is the raw learned-variance output in about [-1, 1] of networks that have one (arXiv:2102.09672,
    Eq. 15), else None.
    """

    x: Tensor
    eps: Tensor
    variance: Tensor | None = None


def expand_like(scalars: Tensor, like: Tensor) -> Tensor:
    """`(b,)` or `()` to a shape that broadcasts against `like` `(b, ...)`, in its dtype and on its device."""
    return scalars.to(like.device, like.dtype).reshape(scalars.shape + (1,) * (like.ndim - scalars.ndim))


@dataclass(frozen=True)
class GaussianProcess:
    """Schedule, path, prediction and reading together: all that a checkpoint was trained with.

    Args:
        schedule: how noise grows with time.
        path: how signal shrinks with it.
        prediction: what the network's output means.
        reads: which number the network sees.
        learned_variance: the network has twice the channels; the second half is the interpolation between the two
            bounds of the reverse variance (arXiv:2102.09672).
    """

    schedule: Schedule = field(default_factory=Cosine)
    path: Path = field(default_factory=VariancePreserving)
    prediction: Prediction = field(default_factory=V)
    noise_conditioning: NoiseConditioning = field(default_factory=LogSNRConditioning)
    learned_variance: bool = False

    def __post_init__(self) -> None:
        # float32 has 24 bits: beyond this the division in (3) has no correct digit left
        limit = 1e-6
        ends = torch.tensor([self.schedule.logsnr_min, self.schedule.logsnr_max], dtype=torch.float64, device="cpu")
        alpha, sigma = self.path.coefficients(ends)
        if isinstance(self.prediction, Eps):  # eps at the very end of the schedule is a legal, if harsh, choice
            limit = 1e-12
        if (self.prediction.determinant(alpha, sigma).abs() < limit).any():
            raise UserError(
                f"{type(self.prediction).__name__} prediction divides by zero on this schedule's range of log-SNR, "
                f"{ends[0]:.1f} to {ends[1]:.1f}: narrow the bounds of the schedule or predict V"
            )

    def logsnr(self, t: Tensor) -> Tensor:
        """Log-SNR at times `t`."""
        return self.schedule.logsnr(t)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times `t`."""
        return self.path.coefficients(self.schedule.logsnr(t))

    def noise_level(self, t: Tensor) -> Tensor:
        """The number the network reads at times `t`."""
        return self.noise_conditioning(t, self.schedule.logsnr(t))

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean data to time t — (1).

        Args:
            x: clean data.
            eps: standard normal, same shape as x.
            t: times in [0, 1], one per sample or one for all.

        Raises:
            ValueError: if the shapes differ; the message gives both.
        """
        if x.shape != eps.shape:
            raise ValueError(f"data and noise must have one shape, got {tuple(x.shape)} and {tuple(eps.shape)}")
        alpha, sigma = self.coefficients(t)
        return expand_like(alpha, x) * x + expand_like(sigma, x) * eps

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say — (2)."""
        a, b = self.prediction.coefficients(*self.coefficients(t))
        return expand_like(a, x) * x + expand_like(b, x) * eps

    def interpret(self, output: Tensor, z: Tensor, t: Tensor) -> Estimate:
        """Data and noise from the network's output — (3).

        Args:
            output: `(b, c, h, w)`, or `(b, 2c, h, w)` with learned variance.
            z: what the network saw, `(b, c, h, w)`.
            t: times in [0, 1], one per sample or one for all.
        """
        variance = None
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
        alpha, sigma = self.coefficients(t)
        a, b = self.prediction.coefficients(alpha, sigma)
        divisor = expand_like(alpha * b - sigma * a, z)
        alpha, sigma, a, b = (expand_like(c, z) for c in (alpha, sigma, a, b))
        return Estimate((b * z - sigma * output) / divisor, (alpha * output - a * z) / divisor, variance)

    def clip(self, estimate: Estimate, z: Tensor, t: Tensor, limit: float) -> Estimate:
        """The estimate with its data clamped to [-limit, limit] and its noise recomputed to fit z — (1)."""
        alpha, sigma = (expand_like(c, z) for c in self.coefficients(t))
        x = estimate.x.clamp(-limit, limit)
        return estimate._replace(x=x, eps=(z - alpha * x) / sigma)

    def add_score(self, estimate: Estimate, z: Tensor, t: Tensor, score: Tensor) -> Estimate:
        """The estimate under p(z) e^E, where `score` is the gradient of E in z: eps falls by sigma times the score.

        With E = s log p(y | z, t) this is classifier guidance (arXiv:2105.05233, Algorithm 2).
        """
        alpha, sigma = (expand_like(c, z) for c in self.coefficients(t))
        eps = estimate.eps - sigma * score
        return estimate._replace(x=(z - sigma * eps) / alpha, eps=eps)

    def eps_error_factor(self, t: Tensor) -> Tensor:
        """alpha / D: what turns an error of the output into an error of eps."""
        alpha, sigma = self.coefficients(t)
        return alpha / self.prediction.determinant(alpha, sigma)
