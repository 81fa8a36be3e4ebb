"""The training loss, for one output or several resolutions.

    (1)  loss = w(logsnr) m(t) (alpha / D)^2 mean((out_hat - out)^2),   m = -d logsnr/dt or 1 (`weightings.py`)

Multiscale loss of Simple Diffusion (arXiv:2301.11093, section "multiscale training loss"): one output, its eps error
averaged down to several resolutions,

    (2)  sum over s of (1 / s) mean((D_s[eps] - D_s[eps_hat])^2),        s in {32, 64, ..., d}

Several outputs (DiMR, arXiv:2406.09416): each output has its own target, the full target averaged over r x r pixels
and multiplied by r, so that noise keeps unit variance; each is weighed by 1 / r^2 unless told otherwise.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess, expand_like
from diffzoo.process.weightings import Weighting
from diffzoo.typing import Data, Images, Tokens

__all__ = ["alignment_loss", "denoising_loss", "direction_loss", "pool_target", "uncertainty_loss", "weight"]


def weight(process: GaussianProcess, weighting: Weighting, t: Tensor) -> Tensor:
    """w(logsnr) m(t): the weight of the squared eps error at times `t`."""
    w = weighting(process.logsnr(t))
    return w * -process.schedule.derivative(t) if weighting.measure == "logsnr" else w


def pool_target(target: Tensor, ratio: int) -> Tensor:
    """The target at 1/ratio of the resolution: block mean times `ratio`, which keeps white noise at unit variance.

    Of a map of `n ratio + 1` pixels the cells are centred on every ratio-th pixel, first and last included: sums over
    `ratio + 1` pixels, zero beyond the border, divided by `ratio + 1`.
    """
    if ratio == 1:
        return target
    if all(size % ratio == 1 for size in target.shape[-2:]):
        kernel = ratio + 1
        return F.avg_pool2d(target, kernel, stride=ratio, padding=kernel // 2) * kernel
    return F.avg_pool2d(target, ratio) * ratio


def _ratio(target: Tensor, output: Tensor) -> int:
    height, width = target.shape[-2:]
    rows, columns = output.shape[-2:]
    ratio, rest = divmod(width, columns)
    fits = not rest and height == ratio * rows
    if not fits and columns > 1:  # n ratio + 1 pixels to n + 1
        ratio, rest = divmod(width - 1, columns - 1)
        fits = not rest and height - 1 == ratio * (rows - 1)
    if not fits or target.shape[1] != output.shape[1]:
        raise ValueError(
            f"an output of shape {tuple(output.shape)} does not fit a target of shape {tuple(target.shape)}: "
            "expected the same channels and a resolution that divides the target's (or n + 1 pixels for n r + 1)"
        )
    return ratio


def denoising_loss(
    process: GaussianProcess,
    weighting: Weighting,
    outputs: Sequence[Tensor],
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    resolutions: Sequence[int] | None = None,
    coefficients: Sequence[float] | None = None,
) -> Tensor:
    """Loss per sample, `(b,)` — (1), with (2) or several outputs.

    Args:
        process: what the outputs mean.
        weighting: which noise levels matter.
        outputs: the network's `training_outputs`, coarse to fine, each `(b, c, h/r, w/r)`, the last one with r = 1.
        x, eps: clean data and the noise that was added, `(b, c, h, w)`.
        t: times, `(b,)`.
        resolutions: the set of s in (2), in pixels; None for the plain loss. One output only.
        coefficients: weight of each output; default 1 / r^2.

    Raises:
        UserError: for resolutions that do not divide the image, or together with several outputs; for a last output
            that is smaller than the image.
    """
    target = process.target(x, eps, t)
    factor = process.eps_error_factor(t)
    if resolutions:
        if len(outputs) != 1:
            raise UserError(
                f"the multiscale loss pools one output, this network has {len(outputs)}: leave out resolutions"
            )
        error = (outputs[0] - target) * expand_like(factor, target)
        loss = torch.stack([_pooled(error, s) / s for s in resolutions]).sum(0)
    else:
        ratios = [_ratio(target, out) for out in outputs]
        if ratios[-1] != 1:
            shapes = f"{tuple(outputs[-1].shape)}, its input {tuple(target.shape)}"
            raise UserError(f"the network's last output has shape {shapes}: it would train and could not sample")
        weights = [1 / r**2 for r in ratios] if coefficients is None else coefficients
        if len(weights) != len(outputs):
            raise UserError(f"expected {len(outputs)} loss coefficients, one per output, got {len(weights)}")
        errors = [
            (out - pool_target(target, r)).square().flatten(1).mean(1) for out, r in zip(outputs, ratios, strict=True)
        ]
        loss = sum(w * e for w, e in zip(weights, errors, strict=True)) * factor.square()
    return loss * weight(process, weighting, t)


def direction_loss(output: Images, target: Images) -> Float[Tensor, "b"]:
    """1 - cosine similarity along the channels, averaged over the positions, `(b,)` (arXiv:2501.01423, section 4).

    LightningDiT adds it, with weight 1, to the mean squared error of the velocity.
    """
    return (1 - F.cosine_similarity(output, target, dim=1)).flatten(1).mean(1)


def alignment_loss(tokens: Tokens, features: Tokens) -> Float[Tensor, "b"]:
    """Minus the cosine similarity of projected tokens and an encoder's features, averaged over tokens, `(b,)`.

    REPA adds it with weight 0.5 (arXiv:2410.06940, Eq. 8).
    """
    return -F.cosine_similarity(tokens, features, dim=-1).mean(1)


def uncertainty_loss(error: Data, log_variance: Float[Tensor, "b"]) -> Data:
    """Weighed squared errors under a learned uncertainty u, error / exp(u) + u, element by element.

    At its optimum u is the logarithm of the mean error at the noise level (arXiv:2312.02696, Eq. 15).
    """
    u = expand_like(log_variance, error)
    return error / u.exp() + u


def _pooled(error: Tensor, resolution: int) -> Tensor:
    height, width = error.shape[-2:]
    ratio, rest = divmod(width, resolution)
    if rest or ratio < 1 or height % ratio:
        raise UserError(f"loss resolution {resolution} does not divide the image size {height} x {width}")
    pooled = F.avg_pool2d(error, ratio) if ratio > 1 else error
    return pooled.square().flatten(1).mean(1)
