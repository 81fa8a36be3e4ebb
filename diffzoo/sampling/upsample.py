"""Chains of models: an upsampler makes the images of a small model larger.

small = sample(denoiser_64, RespacedAncestral(steps=250), (3, 64, 64), seeds, Condition(label=label))
large = upsample(denoiser_64_to_256, RespacedAncestral(steps=250), small, (3, 256, 256), seeds, label=label)
"""

from collections.abc import Sequence
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.loop import SampleOptions, sample
from diffzoo.sampling.samplers import Sampler
from diffzoo.typing import Condition, Images, Labels

__all__ = ["quantise", "upsample"]


def quantise(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Images in [-1, 1] on the 256 levels of an image file, each cut down to the level below, as ADM's are."""
    # a level of its own, rounded in float32, stays that level
    return ((images + 1) * 127.5 + 1e-3).clamp(0, 255).floor() / 127.5 - 1


def upsample(
    denoise: Denoise,
    sampler: Sampler,
    images: Images,
    shape: Sequence[int],
    seeds: Sequence[int],
    label: Labels | None = None,
    **options: Unpack[SampleOptions],
) -> Float[Tensor, "b c h2 w2"]:
    """Sample images like these, of another size.

    Upsamplers were trained on image files, so the images are rounded to 256 levels first.

    Args:
        denoise: an upsampler's denoiser, guided or not.
        sampler: how to step, and where.
        images: the small images, `(n, c, h, w)` in [-1, 1].
        shape: of one large image, `(c, h', w')`.
        seeds: one per image; the seeds of the small images may be used again.
        label: class index per image, for class-conditional upsamplers.
        options: of `sample`.

    Returns:
        Large images `(n, c, h', w')`.
    """
    if images.ndim != 4 or images.shape[1] != shape[0]:
        raise UserError(f"expected small images of shape (n, {shape[0]}, h, w), got {tuple(images.shape)}")
    return sample(denoise, sampler, shape, seeds, Condition(label=label, low_res=quantise(images)), **options)
