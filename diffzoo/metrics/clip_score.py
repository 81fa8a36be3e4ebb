"""CLIPScore (arXiv:2104.08718): how well images fit their captions, as 100 times the cosine, floored at 0.

The paper multiplies by 2.5 and reports 0..2.5; the factor 100 is what text-to-image papers print.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.typing import Features

__all__ = ["clip_scores"]


def clip_scores(images: Features, captions: Float[Tensor, "m d"]) -> Float[Tensor, "n"]:
    """One score per pair `(n,)`, float64.

    Args:
        images: CLIP image embeddings `(n, d)`.
        captions: CLIP text embeddings `(n, d)` in the same order.
    """
    if images.shape != captions.shape:
        raise UserError(
            f"expected one caption embedding per image, got {tuple(captions.shape)} for images {tuple(images.shape)}"
        )
    return 100 * torch.cosine_similarity(images.double(), captions.double(), dim=1).clamp(min=0)
