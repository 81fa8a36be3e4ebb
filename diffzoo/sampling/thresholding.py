"""Dynamic thresholding (arXiv:2205.11487, Section 2.3): a denoiser around a denoiser, for images in [-1, 1].

Strong guidance drives x_hat out of the range of images. A clamp to [-1, 1] (`Sampler.clip`) saturates such pixels; here
each image's x_hat is clamped to [-s, s] and divided by s, where s is a high quantile of its own |x_hat|, at least 1.
"""

import torch

from diffzoo.errors import UserError
from diffzoo.process.gaussian import Estimate, expand_like
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.guidance import DenoiserAround
from diffzoo.typing import Condition, Data, Times

__all__ = ["DynamicThresholding"]


class DynamicThresholding(DenoiserAround):
    """Keeps x_hat in [-1, 1] by its own quantile, with eps recomputed to fit z.

    Args:
        denoise: a denoiser of images, guided or not. Latents have no range to keep.
        quantile: of |x_hat|, in (0, 1); 0.995 in the public code after Imagen.
    """

    def __init__(self, denoise: Denoise, quantile: float = 0.995):
        if not 0 < quantile < 1:
            raise UserError(f"expected a quantile in (0, 1), got {quantile}")
        self.denoise, self.quantile = denoise, quantile

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """The thresholded estimate."""
        estimate = self.denoise(z, t, cond)
        sizes = estimate.x.flatten(1).abs()
        s = expand_like(torch.quantile(sizes.float(), self.quantile, dim=1).clamp_min(1), z)
        alpha, sigma = (expand_like(c, z) for c in self.process.coefficients(t))
        x = torch.maximum(torch.minimum(estimate.x, s), -s) / s
        return estimate._replace(x=x, eps=(z - alpha * x) / sigma)
