"""Fréchet distance of two Gaussians fitted to features (arXiv:1706.08500, Eq. 6).

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The eigenvalues of S1 S2 are those of the symmetric L^T S2 L for any L L^T = S1, so that symmetric eigenproblems
replace the square root of a nonsymmetric matrix. Where S1 is singular L comes from its eigenvectors, so that this holds
for covariances of any rank, where the matrix square root of SciPy turns noisy or complex.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics.moments import Moments

__all__ = ["FrechetReference", "frechet_distance"]


@dataclass(frozen=True)
class FrechetReference:
    """Mean, covariance and a factor of the covariance, so that many distances to one reference cost one each.

    Args:
        mean: `(d,)`, float64.
        covariance: `(d, d)`, float64.
        factor: `(d, r)` with factor factor^T = covariance.
    """

    mean: Tensor
    covariance: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "FrechetReference":
        """Factorise a covariance; raises a `UserError` for statistics that are none."""
        mean, covariance = mean.to(torch.float64), covariance.to(torch.float64)
        d = mean.shape[0]
        if covariance.shape != (d, d):
            raise UserError(f"expected a covariance of shape ({d}, {d}), got {tuple(covariance.shape)}")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise UserError("the statistics are not finite: make them again from the images")
        return cls(mean, covariance, _factor((covariance + covariance.T) / 2))

    def distance(self, mean: Tensor, covariance: Tensor) -> float:
        """Squared Fréchet distance, as FID is reported, to a Gaussian of this dimension."""
        mean, covariance = mean.to(self.mean), covariance.to(self.mean)
        if mean.shape != self.mean.shape:
            raise UserError(
                f"the statistics have {mean.shape[0]} dimensions and the reference {self.mean.shape[0]}: "
                "they come from different feature networks"
            )
        product = self.factor.T @ covariance @ self.factor
        values = torch.linalg.eigvalsh((product + product.T) / 2)
        root = values[values > _rounding(values)].sqrt().sum()
        gap = (mean - self.mean).square().sum()
        return float(gap + self.covariance.trace() + covariance.trace() - 2 * root)

    def distance_of(self, moments: Moments) -> float:
        """Squared Fréchet distance to the Gaussian with these moments."""
        return self.distance(moments.mean, moments.covariance())


def _factor(covariance: Tensor) -> Tensor:
    """Some L with L L^T = covariance: Cholesky's where it exists with digits to spare, which is four times faster than
    eigenvectors, else the eigenvectors of the eigenvalues that are not zero."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if not failed and len(pivots) and float(pivots.min()) > 1e-8 * float(pivots.max()):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > _rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


def _rounding(values: Tensor) -> float:
    # what rounding makes of a zero eigenvalue; its square root would not be small
    if not len(values):
        return 0.0
    return float(values.abs().max()) * len(values) * torch.finfo(values.dtype).eps


def frechet_distance(first: Moments, second: Moments | Sequence[Tensor]) -> float:
    """Squared Fréchet distance between two sets of features.

    Args:
        first: moments of one set.
        second: moments of the other, or its (mean, covariance).
    """
    mean, covariance = (second.mean, second.covariance()) if isinstance(second, Moments) else second
    return FrechetReference.of(mean, covariance).distance_of(first)
