"""Resizing as the protocols do it. The same words for it in different programs mean different pixels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from diffzoo.sizes import Size, sides
from diffzoo.typing import Images

__all__ = ["resize_bicubic", "resize_tf1"]


def _taps(size: int, to: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.arange(to, dtype=torch.float32, device=device) * (size / to)
    low = source.floor().long()
    return low, (low + 1).clamp(max=size - 1), source - low


def resize_tf1(images: Shaped[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c {size} {size}"]:
    """Bilinear resize of TensorFlow 1: source = target * in / out, no half-pixel shift, no antialiasing.

    This is what the 2015 Inception graph does inside, also when it shrinks.

    Args:
        images: float `(b, c, h, w)`.
        size: height and width of the result in pixels.
    """
    h, w = images.shape[-2:]
    if (h, w) == (size, size):
        return images
    top, bottom, y = _taps(h, size, images.device)
    left, right, x = _taps(w, size, images.device)
    rows_top, rows_bottom = images[..., top, :], images[..., bottom, :]
    x, y = x.to(images.dtype), y.to(images.dtype)[:, None]
    upper = rows_top[..., left] + (rows_top[..., right] - rows_top[..., left]) * x
    lower = rows_bottom[..., left] + (rows_bottom[..., right] - rows_bottom[..., left]) * x
    return upper + (lower - upper) * y


def resize_bicubic(images: Images, size: Size) -> Float[Tensor, "b c to_h to_w"]:
    """Bicubic resize with antialiasing of float `(b, c, h, w)` to this height and width."""
    if tuple(images.shape[-2:]) == sides(size):
        return images
    return F.interpolate(images, size=sides(size), mode="bicubic", antialias=True, align_corners=False)
