"""Fréchet distance of two Gaussians fitted to features (arXiv:1706.08500, Eq. 6).

    (1)  d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With factors S1 = L1 L1^T and S2 = L2 L2^T of any kind,

    (2)  tr (S1 S2)^(1/2) = sum of the singular values of L1^T L2.

The eigenvalues of S1 S2 are the squares of these singular values: where they are below the largest one times the
rounding error they are lost, though their square roots are not small. (2) never forms the square, so it holds for
spectra of any width and, with factors that have no columns for the eigenvalue zero, for covariances of any rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics.moments import Moments

__all__ = ["FrechetReference", "frechet_distance", "frechet_ratio"]

ASYMMETRY = 1e-4  # relative; float32 statistics are symmetric to 1e-6


def _check(mean: Tensor, covariance: Tensor) -> None:
    """Refuse statistics that are none of a Gaussian."""
    d = mean.shape[0]
    if covariance.shape != (d, d):
        raise UserError(f"expected a covariance of shape ({d}, {d}), got {tuple(covariance.shape)}")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError("the statistics are not finite: make them again from the images")
    asymmetry = (covariance - covariance.T).abs().max()
    if asymmetry > ASYMMETRY * covariance.abs().max():
        raise UserError(
            f"expected a covariance, got a matrix that is not symmetric (by up to {float(asymmetry):.3g}): "
            "did you save a triangle or a factor of it?"
        )


@dataclass(frozen=True)
class FrechetReference:
    """Mean, covariance and a factor of the covariance, so that many distances to one reference factorise it once.

    Args:
        mean: float64.
        covariance: float64.
        factor: factor factor^T = covariance, of rank r.
    """

    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]
    factor: Float64[Tensor, "d r"]

    @classmethod
    def of(cls, mean: Float[Tensor, "d"], covariance: Float[Tensor, "..."]) -> "FrechetReference":
        """Factorise a covariance.

        Raises:
            UserError: for a covariance of another shape, values that are not finite, or a matrix that is not symmetric.
        """
        mean, covariance = mean.to(torch.float64), covariance.to(torch.float64)
        _check(mean, covariance)
        covariance = (covariance + covariance.T) / 2
        return cls(mean, covariance, _factor(covariance))

    def distance(self, mean: Float[Tensor, "e"], covariance: Float[Tensor, "..."]) -> float:
        """Squared Fréchet distance (1), as FID is reported, to another Gaussian.

        Raises:
            UserError: for statistics of another dimension, or that `of` refuses.
        """
        if mean.shape != self.mean.shape:
            raise UserError(
                f"the statistics have {mean.shape[0]} dimensions and the reference {self.mean.shape[0]}: "
                "they come from different feature networks"
            )
        other = FrechetReference.of(mean.to(self.mean), covariance.to(self.mean))
        root = torch.linalg.svdvals(self.factor.T @ other.factor).sum()
        gap = (other.mean - self.mean).square().sum()
        return float(gap + self.covariance.trace() + other.covariance.trace() - 2 * root)

    def distance_of(self, moments: Moments) -> float:
        """Squared Fréchet distance to the Gaussian with these moments."""
        return self.distance(moments.mean, moments.covariance())

    def changes(self, moments: Moments, others: Iterable[Moments]) -> list[float]:
        """To first order, how much further than `moments` each of `others` is from the reference.

        With L L^T the covariance of the reference and L^T S L = U s^2 U^T, the derivative of (1) in the mean m and the
        covariance S is

            (3)  2 (m - mean)   and   I - L U s^-1 U^T L^T.

        One eigenproblem serves any number of neighbours of one set: a jackknife costs little more than the distance.
        """
        covariance = moments.covariance()
        gap, slope = 2 * (moments.mean - self.mean), _slope(self.factor, covariance)
        return [
            float(gap @ (o.mean - moments.mean) + (slope * (o.covariance() - covariance)).sum()) for o in others
        ]  # fmt: skip


def _slope(factor: Tensor, covariance: Tensor) -> Tensor:
    """The second part of (3)."""
    inner = factor.T @ covariance @ factor
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    kept = values > _rounding(values)
    half = factor @ vectors[:, kept] * values[kept] ** -0.25
    return torch.eye(len(covariance), dtype=half.dtype, device=half.device) - half @ half.T


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
    # a zero eigenvalue is rounded to about this, and its square root would not be small
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


def frechet_ratio(distances: Sequence[float], held_out: Sequence[float]) -> float:
    """FDr^k: Fréchet distances in k representations, each in units of real images' own (arXiv:2604.28190).

    The mean over the representations of d(sample, training images) / d(held-out images, training images). Held-out
    images themselves score 1; a set that is tuned to one network's features does not get there.

    Args:
        distances: of the samples, one per representation.
        held_out: of as many held-out real images, in the same order. For ImageNet the paper takes the validation set,
            in Inception-v3, ConvNeXt-v2, DINOv2, MAE, SigLIP 2 and CLIP.

    Raises:
        UserError: for lists that do not match, or a held-out distance that is not positive.
    """
    if len(distances) != len(held_out) or not distances:
        raise UserError(f"expected a held-out distance per distance, got {len(held_out)} for {len(distances)}")
    if min(held_out) <= 0:
        raise UserError("a held-out distance is not positive: are these images those of the reference?")
    return sum(d / h for d, h in zip(distances, held_out, strict=True)) / len(distances)
