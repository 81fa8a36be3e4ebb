"""Metrics for training loops: torchmetrics states that add over batches and over ranks.

Each holds a few sums in float64, whatever the number of images, and reduces them by addition, so that many ranks give
what one gives. They are no part of a network: keep them out of checkpoints, EMA and casts.
"""

from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics import Metric

from diffzoo.metrics.frechet import FrechetReference
from diffzoo.metrics.inception_score import score_of_sums, score_sums
from diffzoo.metrics.moments import Moments
from diffzoo.typing import Features

__all__ = ["FrechetDistance", "InceptionScore"]


class FrechetDistance(Metric):
    """Fréchet distance of features to a reference Gaussian; FID on Inception's pool layer.

    The sums are taken about the reference mean, so that a common offset of the features costs no digits.

    Args:
        mean: of the reference, `(d,)`.
        covariance: of the reference, `(d, d)`.
        **options: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    mean: Tensor
    covariance: Tensor
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, mean: Float[Tensor, "d"], covariance: Float[Tensor, "d d"], **options: Any):
        super().__init__(**options)
        d = len(mean)
        self.register_buffer("mean", mean.to(torch.float64), persistent=False)
        self.register_buffer("covariance", covariance.to(torch.float64), persistent=False)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Features) -> None:
        """Add features `(b, d)`."""
        x = features.to(self.total) - self.mean
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.outer += x.T @ x

    def compute(self) -> Float64[Tensor, ""]:
        """The distance, float64 `()`."""
        shift = self.total / self.count
        scatter = self.outer - torch.outer(shift, shift) * self.count
        moments = Moments(int(self.count), self.mean + shift, scatter)
        value = FrechetReference.of(self.mean, self.covariance).distance_of(moments)
        return torch.tensor(value, dtype=torch.float64, device=self.total.device)


class InceptionScore(Metric):
    """Inception Score over all images as one split.

    Args:
        classes: number of logits.
        **options: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, classes: int, **options: Any):
        super().__init__(**options)
        self.add_state("sums", torch.zeros(classes + 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b classes"]) -> None:
        """Add logits `(b, classes)`."""
        self.sums += score_sums(logits).to(self.sums)

    def compute(self) -> Float64[Tensor, ""]:
        """The score, float64 `()`."""
        return torch.tensor(score_of_sums(self.sums), dtype=torch.float64, device=self.sums.device)
