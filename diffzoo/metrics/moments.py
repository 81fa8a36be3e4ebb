"""Mean and covariance of features, in float64, in one pass and mergeable.

    (1)  n = n1 + n2,  d = m2 - m1
    (2)  m = m1 + d n2 / n
    (3)  S = S1 + S2 + d d^T n1 n2 / n            S = sum of (x - m)(x - m)^T

Centred sums lose no digits to a common offset of the features, as sums of squares do. Floating-point addition is not
associative, so equal results need an equal order of merging: callers merge by position, never by arrival.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.typing import Features

__all__ = ["Moments", "merge_all"]


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of a set of feature vectors.

    Args:
        n: number of vectors.
        mean: their mean `(d,)`, float64.
        scatter: sum of outer products about the mean `(d, d)`, float64.
    """

    n: int
    mean: Float64[Tensor, "d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Moments of features `(n, d)`.

        Raises:
            UserError: if a feature is not finite.
        """
        x = features.to(torch.float64)
        if not torch.isfinite(x).all():
            raise UserError("the features are not finite: the images or the weights of the feature network are broken")
        if not len(x):
            return cls(0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together — (1) to (3)."""
        n = self.n + other.n
        if not self.n or not other.n:
            return other if not self.n else self
        d = other.mean - self.mean
        mean = self.mean + d * (other.n / n)
        return Moments(n, mean, self.scatter + other.scatter + torch.outer(d, d) * (self.n * other.n / n))

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Covariance with divisor n - 1.

        Raises:
            UserError: for fewer than two vectors.
        """
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}")
        return self.scatter / (self.n - 1)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """All parts merged from left to right."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    if total is None:
        raise UserError("there are no features to summarise: got no images")
    return total
