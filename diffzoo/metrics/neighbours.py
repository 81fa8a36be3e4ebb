"""Metrics of nearest neighbours: improved precision and recall, density and coverage, memorisation.

Precision and recall (arXiv:1904.06991): an image lies in the manifold of a set if it falls into the ball around one
of its members whose radius reaches that member's k-th nearest neighbour. Balls are closed and a member is not its own
neighbour, as in the evaluator of arXiv:2105.05233; that evaluator measures in float16 first, so its published values
differ from exact ones in the third decimal.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffzoo.errors import UserError

__all__ = [
    "DensityCoverage",
    "PrecisionRecall",
    "density_coverage",
    "nearest",
    "precision_recall",
    "squared_distances",
    "squared_radii",
]

ROWS = 2048


class PrecisionRecall(NamedTuple):
    """Which samples lie in the reference manifold, `(n,)`, and which references in the samples' manifold, `(m,)`."""

    sample_inside: Tensor
    reference_inside: Tensor

    @property
    def precision(self) -> float:
        """Share of samples inside the reference manifold."""
        return float(self.sample_inside.double().mean())

    @property
    def recall(self) -> float:
        """Share of reference images inside the manifold of the samples."""
        return float(self.reference_inside.double().mean())


class DensityCoverage(NamedTuple):
    """Reference balls around each sample divided by k, `(n,)`, and which reference balls hold a sample, `(m,)`."""

    balls: Tensor
    covered: Tensor

    @property
    def density(self) -> float:
        """Mean number of reference balls around a sample, divided by k: may exceed 1."""
        return float(self.balls.double().mean())

    @property
    def coverage(self) -> float:
        """Share of reference balls that hold a sample."""
        return float(self.covered.double().mean())


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances `(n, m)` in the precision of the inputs.

    Computed as |u|^2 - 2uv + |v|^2; where that cancels, from the differences, so that duplicates are at distance 0.
    """
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    d = torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)
    close = (d < 1e-6 * norms).nonzero()
    for part in close.split(65536):
        i, j = part.unbind(1)
        d[i, j] = (a[i] - b[j]).square().sum(1)
    return d


def _blocks(x: Tensor, y: Tensor, rows: int = ROWS) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, squared_distances(x[part], y)


def squared_radii(features: Tensor, k: int = 3) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour among the others, `(n,)`.

    Raises:
        UserError: if there are not more than k rows.
    """
    if len(features) <= k:
        raise UserError(f"the {k}-th nearest neighbour needs more than {k} images, got {len(features)}")
    # a row is at distance 0 of itself: entry k of the sorted row is its k-th neighbour
    return torch.cat([d.kthvalue(k + 1, dim=1).values for _, d in _blocks(features, features)])


def _pair(sample: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if sample.shape[1] != reference.shape[1]:
        raise UserError(
            f"the samples have {sample.shape[1]} features and the reference {reference.shape[1]}: "
            "they come from different feature networks"
        )
    return sample.to(torch.float64), reference.to(torch.float64)


def precision_recall(sample: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        sample: features of the generated images `(n, d)`.
        reference: features of real images `(m, d)`; the sizes may differ, and the values depend on both.
        k: neighbours.
    """
    x, y = _pair(sample, reference)
    sample_radii, reference_radii = squared_radii(x, k), squared_radii(y, k)
    reference_inside = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    sample_inside = []
    for part, d in _blocks(x, y):
        sample_inside.append((d <= reference_radii).any(dim=1))
        reference_inside |= (d <= sample_radii[part, None]).any(dim=0)
    return PrecisionRecall(torch.cat(sample_inside), reference_inside)


def density_coverage(sample: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage (arXiv:2002.09797, Eq. 3 and 4), with open balls as in its authors' code.

    Args:
        sample: features of the generated images `(n, d)`.
        reference: features of real images `(m, d)`.
        k: neighbours.
    """
    x, y = _pair(sample, reference)
    radii = squared_radii(y, k)
    covered = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    balls = []
    for _, d in _blocks(x, y):
        inside = d < radii
        balls.append(inside.sum(dim=1) / k)
        covered |= inside.any(dim=0)
    return DensityCoverage(torch.cat(balls), covered)


def nearest(query: Tensor, database: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distance to, and index of, the k nearest rows of `database`: two `(n, k)`, nearest first."""
    x, y = _pair(query, database)
    found = [d.topk(min(k, len(y)), dim=1, largest=False) for _, d in _blocks(x, y)]
    return torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found])
