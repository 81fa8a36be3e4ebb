"""Vendi score: how many different images a set holds, without a reference (arXiv:2210.02410, Definition 3.1).

    (1)  VS = exp(-sum of l log l)        l the eigenvalues of K / n,  K_ij = k(x_i, x_j),  k(x, x) = 1

With cosine similarity the eigenvalues are those of the d x d matrix of second moments of the unit vectors, so n may be
any number. n copies of one image score 1, n images without anything in common score n.
"""

import torch

from diffzoo.errors import UserError
from diffzoo.typing import Features

__all__ = ["vendi_score"]

ROWS = 8192


def vendi_score(features: Features, order: float = 1.0) -> float:
    """(1) with cosine similarity.

    Args:
        features: of the images; scaled to unit length here.
        order: of the entropy (arXiv:2310.12952): 1 is Shannon's; smaller counts rare images more, larger less.

    Raises:
        UserError: for no images, features that are zero or not finite, or an order that is not positive.
    """
    if not len(features):
        raise UserError("the Vendi score needs at least one image, got none")
    if order <= 0:
        raise UserError(f"the order of the Vendi score must be positive, got {order}")
    n, d = features.shape
    moments = torch.zeros(d, d, dtype=torch.float64, device=features.device)
    for part in features.split(ROWS):
        x = part.to(torch.float64)
        norms = x.norm(dim=1, keepdim=True)
        if not (torch.isfinite(norms).all() and (norms > 0).all()):
            raise UserError("features are zero or not finite: the images or the weights of the network are broken")
        x = x / norms
        moments += x.T @ x
    values = torch.linalg.eigvalsh(moments / n).clamp_min(0)
    values = values / values.sum()
    if order == 1:
        return float(torch.special.entr(values).sum().exp())
    return float(values[values > 0].pow(order).sum().log().div(1 - order).exp())
