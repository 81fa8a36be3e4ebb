"""The Gaussian diffusion process: one owner for schedule, path, prediction and what the network reads.

Conventions, the same in every file of diffzoo:

    x        clean data, in [-1, 1] (images) or of unit variance (latents)
    eps      standard normal noise
    t        time in [0, 1]: 0 = data, 1 = noise; sampling goes from t to a smaller s
    logsnr   log(alpha^2 / sigma^2), decreasing in t

    (1)  z = alpha(t) x + sigma(t) eps                     (arXiv:2301.11093, Eq. 1)
    (2)  out = a x + b eps                                 what the network is trained to say (`predictions.py`)
    (3)  x_hat = (b z - sigma out) / D,  eps_hat = (alpha out - a z) / D,  D = alpha b - sigma a

Some networks were trained on data divided by a scale d, so that it has unit variance, or say the opposite of what
others say. With X = x / d and a sign o = +-1, path and prediction are stated of X, and the log-SNR stays that of x:

    (4)  z = A X + S eps,  out = o (a X + b eps),  2 log(A / S) = logsnr + 2 log d;  alpha = A / d, sigma = S

EDM (arXiv:2206.00364) is an instance: with A^2 + S^2 = 1, d = sigma_data = 0.5 and s = exp(-logsnr / 2), its
c_in (x + s eps) is z, and its raw output is -(A eps - S X), the opposite of V.

Tensors are batch first. Per-sample scalars have shape `(b,)`, or `()` for a whole batch at one time, and broadcast
through `expand_like`.
"""

from dataclasses import dataclass, field
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.noise_conditioning import LogSNRConditioning, NoiseConditioning
from diffzoo.process.paths import Path, VariancePreserving
from diffzoo.process.predictions import Eps, Inverse, Prediction, V
from diffzoo.process.schedules import Cosine, Schedule
from diffzoo.process.table import tabulated
from diffzoo.typing import Data, PerSample, Times

__all__ = ["Estimate", "GaussianProcess", "expand_like"]


class Estimate(NamedTuple):
    """A denoiser's estimate of clean data and noise, consistent with z by (1).

    `variance` is the raw learned-variance output in about [-1, 1] of networks that have one (arXiv:2102.09672,
    Eq. 15), else None.
    """

    x: Tensor
    eps: Tensor
    variance: Tensor | None = None


def expand_like(scalars: PerSample, like: Data) -> Tensor:
    """`(b,)` or `()` to a shape that broadcasts against `like` `(b, ...)`, in its dtype and on its device.

    A scalar on the CPU stays there: a kernel on any device takes it as an argument, and nothing waits for a copy.
    """
    if scalars.ndim == 0 and scalars.device.type == "cpu":
        return scalars.to(like.dtype)
    return scalars.to(like.device, like.dtype).reshape(scalars.shape + (1,) * (like.ndim - scalars.ndim))


@dataclass(frozen=True)
class GaussianProcess:
    """Schedule, path, prediction and noise conditioning together: all that a checkpoint was trained with.

    Args:
        schedule: how noise grows with time.
        path: how signal shrinks with it.
        prediction: what the network's output means.
        noise_conditioning: which number the network sees.
        learned_variance: the network has twice the channels; the second half is the interpolation between the two
            bounds of the reverse variance (arXiv:2102.09672).
        data_scale: d of (4), what the data is divided by before the path and the prediction apply; positive.
        output_sign: o of (4), 1 or -1.

    Raises:
        UserError: for a scale or sign out of range, and for a prediction that divides by zero on the schedule's range.
    """

    schedule: Schedule = field(default_factory=Cosine)
    path: Path = field(default_factory=VariancePreserving)
    prediction: Prediction = field(default_factory=V)
    noise_conditioning: NoiseConditioning = field(default_factory=LogSNRConditioning)
    learned_variance: bool = False
    data_scale: float = 1.0
    output_sign: int = 1

    def __post_init__(self) -> None:
        if self.data_scale <= 0:
            raise UserError(f"data_scale: expected a positive number, got {self.data_scale}")
        if self.output_sign not in (1, -1):
            raise UserError(f"output_sign: expected 1 or -1, got {self.output_sign!r}")
        # float32 has 24 bits: beyond this the division in (3) has no correct digit left
        limit = 1e-6
        ends = torch.tensor([self.schedule.logsnr_min, self.schedule.logsnr_max], dtype=torch.float64, device="cpu")
        alpha, sigma = self.path.coefficients(ends + 2 * log(self.data_scale))
        if isinstance(self.prediction, Eps):  # eps at the very end of the schedule is a legal, if harsh, choice
            limit = 1e-12
        if (self.prediction.determinant(alpha, sigma).abs() < limit).any():
            raise UserError(
                f"{type(self.prediction).__name__} prediction divides by zero on this schedule's range of log-SNR, "
                f"{ends[0]:.1f} to {ends[1]:.1f}: narrow the bounds of the schedule or predict V"
            )

    @tabulated
    def logsnr(self, t: Times) -> PerSample:
        """Log-SNR at times `t`."""
        return self.schedule.logsnr(t)

    @tabulated
    def coefficients(self, t: Times) -> tuple[PerSample, PerSample]:
        """(alpha, sigma) at times `t`."""
        return self.coefficients_at(self.schedule.logsnr(t))

    def coefficients_at(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        """(alpha, sigma) where the log-SNR has this value — (4)."""
        alpha, sigma = self._scaled(logsnr)
        return alpha / self.data_scale, sigma

    def derivatives_at(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        """d alpha / d logsnr and d sigma / d logsnr where the log-SNR has this value."""
        d_alpha, d_sigma = self.path.derivatives(logsnr + 2 * log(self.data_scale))
        return d_alpha / self.data_scale, d_sigma

    def _scaled(self, logsnr: PerSample) -> tuple[PerSample, PerSample]:
        """(A, S) of (4)."""
        return self.path.coefficients(logsnr + 2 * log(self.data_scale))

    @tabulated
    def noise_level(self, t: Times) -> PerSample:
        """The number the network reads at times `t`."""
        return self.noise_conditioning(t, self.schedule.logsnr(t))

    def add_noise(self, x: Data, eps: Tensor, t: Times) -> Data:
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

    def target(self, x: Data, eps: Data, t: Times) -> Data:
        """The training target of the network — (2), (4)."""
        a, b = self.prediction.coefficients(*self._scaled(self.schedule.logsnr(t)))
        a, b = self.output_sign / self.data_scale * a, self.output_sign * b
        return expand_like(a, x) * x + expand_like(b, x) * eps

    def interpret(self, output: Float[Tensor, "b *out"], z: Data, t: Times) -> Estimate:
        """Data and noise from the network's output — (3).

        Args:
            output: `(b, c, h, w)`, or `(b, 2c, h, w)` with learned variance.
            z: what the network saw, `(b, c, h, w)`.
            t: times in [0, 1], one per sample or one for all.
        """
        variance = None
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
        inverse = self._inverse(t, z.dtype)
        x_z, x_out, eps_z, eps_out, divisor = (expand_like(c, z) for c in inverse) if t.ndim else inverse
        x, eps = x_z * z + x_out * output, eps_z * z + eps_out * output
        return Estimate(x / divisor, eps / divisor, variance)

    @tabulated
    def _inverse(self, t: Times, dtype: torch.dtype) -> Inverse:
        """The coefficients of (3) under (4) at times `t`, rounded to the dtype of the data."""
        inverse = self.prediction.inverse(*self._scaled(self.schedule.logsnr(t)))
        x_z, x_out, eps_z, eps_out, divisor = (c.to(dtype) for c in inverse)
        scale, sign = self.data_scale, self.output_sign
        return Inverse(scale * x_z, scale * sign * x_out, eps_z, sign * eps_out, divisor)

    def clip(self, estimate: Estimate, z: Data, t: Times, limit: float) -> Estimate:
        """The estimate with its data clamped to [-limit, limit] and its noise recomputed to fit z — (1)."""
        alpha, sigma = (expand_like(c, z) for c in self.coefficients(t))
        x = estimate.x.clamp(-limit, limit)
        return estimate._replace(x=x, eps=(z - alpha * x) / sigma)

    def add_score(self, estimate: Estimate, z: Data, t: Times, score: Data) -> Estimate:
        """The estimate under p(z) e^E, where `score` is the gradient of E in z: eps falls by sigma times the score.

        With E = s log p(y | z, t) this is classifier guidance (arXiv:2105.05233, Algorithm 2).
        """
        alpha, sigma = (expand_like(c, z) for c in self.coefficients(t))
        eps = estimate.eps - sigma * score
        return estimate._replace(x=(z - sigma * eps) / alpha, eps=eps)

    def eps_error_factor(self, t: Times) -> PerSample:
        """alpha / D: what turns an error of the output into an error of eps."""
        alpha, sigma = self._scaled(self.schedule.logsnr(t))
        return self.output_sign * alpha / self.prediction.determinant(alpha, sigma)
