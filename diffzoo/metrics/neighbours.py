"""Metrics of nearest neighbours: improved precision and recall, density and coverage, AuthPct, memorisation.

Precision and recall (arXiv:1904.06991): an image lies in the manifold of a set if it falls into the ball around one
of its members whose radius reaches that member's k-th nearest neighbour. Balls are closed and a member is not its own
neighbour, as in the evaluator of arXiv:2105.05233; that evaluator measures in float16 first, so its published values
differ from exact ones in the third decimal.

Every decision is that of exact distances, |x - y|^2 summed from the differences in float64, whose value does not depend
on the order of the two rows: duplicates are at distance 0 and ties are ties. A float32 product screens the pairs; those
that it cannot decide are measured again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics.features import float32_digits
from diffzoo.typing import Features

__all__ = [
    "DensityCoverage",
    "PrecisionRecall",
    "authentic",
    "density_coverage",
    "nearest",
    "precision_recall",
    "squared_radii",
]

ROWS = 2048
SPARE = 4  # candidates beyond the k that are asked for, among which the screening may have mixed up the order
# how far |x|^2 - 2 x y + |y|^2 is from the exact distance, in units of the largest |x|^2 + |y|^2: several times what
# rounding does at 2048 dimensions
ERROR = {torch.float32: 2e-5, torch.float64: 1e-12}


class PrecisionRecall(NamedTuple):
    """Masks of the samples in the reference manifold and of the references in the samples' manifold."""

    sample_inside: Bool[Tensor, "n"]
    reference_inside: Bool[Tensor, "m"]

    @property
    def precision(self) -> float:
        """Share of samples inside the reference manifold."""
        return float(self.sample_inside.double().mean())

    @property
    def recall(self) -> float:
        """Share of reference images inside the manifold of the samples."""
        return float(self.reference_inside.double().mean())


class DensityCoverage(NamedTuple):
    """Reference balls around each sample divided by k, and which reference balls hold a sample."""

    balls: Float[Tensor, "n"]
    covered: Bool[Tensor, "m"]

    @property
    def density(self) -> float:
        """Mean number of reference balls around a sample, divided by k: may exceed 1."""
        return float(self.balls.double().mean())

    @property
    def coverage(self) -> float:
        """Share of reference balls that hold a sample."""
        return float(self.covered.double().mean())


class _Rows(NamedTuple):
    """Features in float64, and as a screening sees them: about a common centre, with the squares of their norms."""

    exact: Tensor
    centre: Tensor
    screened: Tensor
    norms: Tensor

    @classmethod
    def of(cls, features: Tensor, centre: Tensor, dtype: torch.dtype = torch.float32) -> "_Rows":
        exact = features.to(torch.float64)
        about = exact - centre
        return cls(exact, centre, about.to(dtype), about.square().sum(1).to(dtype))

    def at(self, rows: slice | Tensor) -> "_Rows":
        return _Rows(self.exact[rows], self.centre, self.screened[rows], self.norms[rows])

    def precise(self) -> "_Rows":
        """The same rows for a screening in float64."""
        return _Rows.of(self.exact, self.centre, torch.float64)


def _screen(a: _Rows, b: _Rows) -> tuple[Tensor, float]:
    """Squared distances `(n, m)` and a bound on their error."""
    with float32_digits():
        d = a.screened @ b.screened.T
    d.mul_(-2).add_(a.norms[:, None]).add_(b.norms)
    return d, ERROR[d.dtype] * float(a.norms.max() + b.norms.max())


def _exact(a: _Rows, b: _Rows, i: Tensor, j: Tensor) -> Tensor:
    """Exact squared distances of the pairs (i, j), float64."""
    # in parts that a cache holds
    parts = zip(i.split(256), j.split(256), strict=True)
    return torch.cat([a.exact[p].sub_(b.exact[q]).square_().sum(1) for p, q in parts])


def _spans(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def _pair(sample: Tensor, reference: Tensor) -> tuple[_Rows, _Rows]:
    if sample.shape[1] != reference.shape[1]:
        raise UserError(
            f"the samples have {sample.shape[1]} features and the reference {reference.shape[1]}: "
            "they come from different feature networks"
        )
    centre = reference.to(torch.float64).mean(0)
    return _Rows.of(sample, centre), _Rows.of(reference, centre)


# -- the nearest


class _Candidates(NamedTuple):
    """For each row the closest columns so far, by screened distance, in no order."""

    distance: Tensor
    column: Tensor

    @classmethod
    def of(cls, d: Tensor, count: int, first: int = 0) -> "_Candidates":
        found = d.topk(min(count, d.shape[1]), dim=1, largest=False, sorted=False)
        return cls(found.values, found.indices + first)

    def closest(self, other: "_Candidates", count: int) -> "_Candidates":
        distance, column = torch.cat([self.distance, other.distance], 1), torch.cat([self.column, other.column], 1)
        kept = distance.topk(min(count, distance.shape[1]), dim=1, largest=False, sorted=False).indices
        return _Candidates(distance.gather(1, kept), column.gather(1, kept))


def _settled(a: _Rows, b: _Rows, found: _Candidates, k: int, error: float) -> tuple[Tensor, Tensor]:
    """Exact distances and columns of the k nearest of each row, nearest first."""
    n, width = found.column.shape
    column = found.column.sort(dim=1).values
    rows = torch.arange(n, device=column.device)[:, None].expand_as(column)
    distance = _exact(a, b, rows.flatten(), column.flatten()).reshape(n, width)
    distance, order = distance.sort(dim=1, stable=True)
    distance, column = distance[:, :k], column.gather(1, order)[:, :k]
    # where the farthest candidate is not clearly farther than the k-th, another column may be nearer than it looked
    unsure = (found.distance.amax(1) - error <= distance[:, -1]).nonzero().flatten()
    if len(unsure) and width < len(b.exact) and a.screened.dtype != torch.float64:
        x, y = a.at(unsure).precise(), b.precise()
        d, error = _screen(x, y)
        distance[unsure], column[unsure] = _settled(x, y, _Candidates.of(d, width), k, error)
    return distance, column


def squared_radii(features: Features, k: int = 3) -> Float[Tensor, "n"]:
    """Squared distance of each row to its k-th nearest neighbour among the others, float64.

    Raises:
        UserError: if there are not more than k rows.
    """
    return _radii(_Rows.of(features, features.to(torch.float64).mean(0)), k)


def _radii(x: _Rows, k: int) -> Tensor:
    n = len(x.exact)
    if n <= k:
        raise UserError(f"the {k}-th nearest neighbour needs more than {k} images, got {n}")
    # a row is at distance 0 of itself: entry k of the sorted row is its k-th neighbour
    count, error = min(k + 1 + SPARE, n), 0.0
    found: list[_Candidates | None] = [None] * len(range(0, n, ROWS))
    spans = list(_spans(n))
    for i, part in enumerate(spans):  # distances are symmetric: each pair of blocks is multiplied once
        d, rest = _screen(x.at(part), x.at(slice(part.start, n)))
        error = max(error, rest)
        for j, other in enumerate(spans[i:], i):
            block = d[:, other.start - part.start : other.stop - part.start]
            for row, new in ((i, _Candidates.of(block, count, other.start)),) + (
                ((j, _Candidates.of(block.T.contiguous(), count, part.start)),) if j > i else ()
            ):
                old = found[row]
                found[row] = new if old is None else old.closest(new, count)
    radii = []
    for part, candidates in zip(spans, found, strict=True):
        assert candidates is not None
        radii.append(_settled(x.at(part), x, candidates, k + 1, error)[0][:, k])
    return torch.cat(radii)


def nearest(
    query: Features, database: Float[Tensor, "m e"], k: int = 1
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Euclidean distance to, and index of, the k nearest rows of `database`, nearest first.

    Raises:
        UserError: for features of different networks.
    """
    x, y = _pair(query, database)
    k = min(k, len(y.exact))
    found = []
    for part in _spans(len(x.exact)):
        d, error = _screen(x.at(part), y)
        found.append(_settled(x.at(part), y, _Candidates.of(d, k + SPARE), k, error))
    return torch.cat([d for d, _ in found]).sqrt(), torch.cat([i for _, i in found])


# -- the metrics


def _inside(d: Tensor, error: float, a: _Rows, b: _Rows, radii: Tensor, closed: bool) -> Tensor:
    """A mask of the pairs at a distance of at most (in open balls: below) the radius of their row or column.

    Args:
        d: screened distances `(n, m)` of the rows of a and b, and a bound on their error.
        radii: squared, `(n, 1)` or `(1, m)`.
    """
    gap = d - radii.to(d.dtype)
    inside = gap <= 0
    i, j = (gap.abs_() <= error).nonzero().unbind(1)
    if len(i) > 64 * len(d) and d.dtype != torch.float64:  # all of one set look alike: screen it in more digits
        a, b = a.precise(), b.precise()
        return _inside(*_screen(a, b), a, b, radii, closed)
    exact, limit = _exact(a, b, i, j), radii.expand(d.shape)[i, j]
    inside[i, j] = exact <= limit if closed else exact < limit
    return inside


def precision_recall(sample: Features, reference: Float[Tensor, "m e"], k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        sample: features of the generated images.
        reference: features of real images; the sizes may differ, and the values depend on both.
        k: neighbours.

    Raises:
        UserError: for features of different networks, or not more than k images on a side.
    """
    x, y = _pair(sample, reference)
    sample_radii, reference_radii = _radii(x, k), _radii(y, k)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=sample.device)
    sample_inside = []
    for part in _spans(len(sample)):
        rows = x.at(part)
        d, error = _screen(rows, y)
        sample_inside.append(_inside(d, error, rows, y, reference_radii[None], True).any(dim=1))
        reference_inside |= _inside(d, error, rows, y, sample_radii[part, None], True).any(dim=0)
    return PrecisionRecall(torch.cat(sample_inside), reference_inside)


def density_coverage(sample: Features, reference: Float[Tensor, "m e"], k: int = 5) -> DensityCoverage:
    """Density and coverage (arXiv:2002.09797, Eq. 3 and 4), with open balls as in its authors' code.

    A set without ties has density and coverage 1 against itself.

    Args:
        sample: features of the generated images.
        reference: features of real images.
        k: neighbours.

    Raises:
        UserError: for features of different networks, or not more than k images in the reference.
    """
    x, y = _pair(sample, reference)
    radii = _radii(y, k)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=sample.device)
    balls = []
    for part in _spans(len(sample)):
        rows = x.at(part)
        inside = _inside(*_screen(rows, y), rows, y, radii[None], False)
        balls.append(inside.sum(dim=1).double() / k)
        covered |= inside.any(dim=0)
    return DensityCoverage(torch.cat(balls), covered)


def authentic(sample: Features, reference: Float[Tensor, "m e"]) -> Bool[Tensor, "n"]:
    """A mask of the samples that are no copies; its mean is AuthPct (arXiv:2102.08921, Sec. 4; arXiv:2306.04675).

    A sample is authentic if the real image nearest to it is nearer to another real image than to the sample.

    Args:
        sample: features of the generated images.
        reference: features of the training images.

    Raises:
        UserError: for features of different networks, or fewer than two real images.
    """
    distance, index = nearest(sample, reference)
    return squared_radii(reference, 1).sqrt()[index[:, 0]] < distance[:, 0]
