"""Maximum mean discrepancies: KID (arXiv:1801.01401) and CMMD (arXiv:2401.09603)."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.rng import keyed_generator
from diffzoo.typing import Features

__all__ = ["cmmd", "cmmd_parts", "kid", "kid_parts", "kid_subsets"]

ROWS = 2048


def _mean_kernel(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], without_diagonal: bool = False) -> Tensor:
    """Mean of kernel(x y^T), optionally without the pairs of equal index."""
    total = x.new_zeros(())
    for start in range(0, len(x), ROWS):
        k = kernel(x[start : start + ROWS] @ y.T)
        total = total + k.sum()
        if without_diagonal:
            total = total - k.diagonal(start).sum()
    return total / (len(x) * (len(x) - 1) if without_diagonal else len(x) * len(y))


def kid(sample: Features, reference: Float[Tensor, "m d"]) -> float:
    """Kernel Inception Distance: unbiased squared MMD with the kernel (xy/d + 1)^3; may be slightly negative.

    Args:
        sample: features `(n, d)`.
        reference: features `(m, d)`.

    Raises:
        UserError: for fewer than two images on a side.
    """
    return kid_parts([sample], reference)[0]


def kid_parts(parts: Sequence[Tensor], reference: Features) -> list[float]:
    """KID of each of several samples; the part that only the reference takes is computed once."""
    least = min((len(p) for p in (*parts, reference)), default=0)
    if least < 2:
        raise UserError(f"KID needs at least 2 images on each side, got {least}")
    y = reference.to(torch.float64)

    def cubic(inner: Tensor) -> Tensor:
        return (inner / y.shape[1] + 1) ** 3

    own = _mean_kernel(y, y, cubic, True)
    found = []
    for part in parts:
        x = part.to(torch.float64)
        found.append(float(_mean_kernel(x, x, cubic, True) + own - 2 * _mean_kernel(x, y, cubic)))
    return found


def kid_subsets(
    sample: Features, reference: Float[Tensor, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of KID over random subsets drawn without replacement.

    Args:
        sample: features `(n, d)`.
        reference: features `(m, d)`.
        subsets: how many.
        size: images per subset, at most as many as there are.
        seed: of the draws.
    """
    size = min(size, len(sample), len(reference))
    values = []
    for i in range(subsets):
        generator = keyed_generator("cpu", "kid", seed, i)
        rows = torch.randperm(len(sample), generator=generator)[:size].to(sample.device)
        columns = torch.randperm(len(reference), generator=generator)[:size].to(sample.device)
        values.append(kid(sample[rows], reference[columns]))
    spread = torch.tensor(values, dtype=torch.float64)
    return float(spread.mean()), float(spread.std()) if subsets > 1 else 0.0


def cmmd(sample: Features, reference: Float[Tensor, "m d"], sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP-MMD: squared MMD with a Gaussian kernel on unit vectors, times 1000.

    The means include the pairs of an image with itself, as in the authors' code; the value is never negative.

    Args:
        sample: CLIP image embeddings `(n, d)`; scaled to unit length here.
        reference: those of real images `(m, d)`.
        sigma: width of the kernel.
        scale: factor on the result.
    """
    return cmmd_parts([sample], reference, sigma, scale)[0]


def cmmd_parts(parts: Sequence[Tensor], reference: Features, sigma: float = 10.0, scale: float = 1000.0) -> list[float]:
    """CMMD of each of several samples; the part that only the reference takes is computed once."""
    if not (len(reference) and parts and all(len(p) for p in parts)):
        raise UserError("CMMD needs images on each side, got none on one")
    y = torch.nn.functional.normalize(reference.to(torch.float64), dim=1)

    def gaussian(inner: Tensor) -> Tensor:  # |x - y|^2 = 2 - 2xy for unit vectors
        return ((inner - 1) / sigma**2).exp()

    own = _mean_kernel(y, y, gaussian)
    found = []
    for part in parts:
        x = torch.nn.functional.normalize(part.to(torch.float64), dim=1)
        value = _mean_kernel(x, x, gaussian) + own - 2 * _mean_kernel(x, y, gaussian)
        found.append(scale * max(0.0, float(value)))
    return found
