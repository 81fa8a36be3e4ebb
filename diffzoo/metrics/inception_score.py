"""Inception Score (arXiv:1606.03498, Sec. 4): exp of the mean KL divergence of p(y|x) from p(y).

    log IS = mean_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y)

The published protocol takes it over splits of 5,000 consecutive images and averages: a file sorted by class gives a
lower score. The sums below are kept per part and added, so that a split may span parts.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffzoo.errors import UserError

__all__ = ["inception_score", "score_of_sums", "score_sums"]


def score_sums(logits: Float[Tensor, "n classes"]) -> Float64[Tensor, "sums"]:
    """Sums over images, in float64 `(classes + 2,)`: those of p(y|x), that of sum_y p log p, and the count."""
    log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
    p = log_p.exp()
    count = p.new_tensor([float(len(p))])
    return torch.cat([p.sum(dim=0), (p * log_p).sum().reshape(1), count])


def score_of_sums(sums: Float64[Tensor, "sums"]) -> float:
    """Inception Score of the images behind `score_sums` (or a sum of several)."""
    marginal = sums[:-2] / sums[-1]
    return float((sums[-2] / sums[-1] - torch.xlogy(marginal, marginal).sum()).exp())


def inception_score(logits: Float[Tensor, "n classes"], split_size: int = 5000) -> tuple[float, list[float]]:
    """Mean of the scores of consecutive splits, and the scores.

    Args:
        logits: `(n, classes)` in the order of the images.
        split_size: images per split; the last split holds what is left.
    """
    if not len(logits):
        raise UserError("the Inception Score needs at least one image, got none")
    if not torch.isfinite(logits).all():
        raise UserError("the logits are not finite: the images or the weights of the feature network are broken")
    scores = [score_of_sums(score_sums(part)) for part in logits.split(split_size)]
    return sum(scores) / len(scores), scores
