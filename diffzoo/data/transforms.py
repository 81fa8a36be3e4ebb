"""From a decoded image to uint8 pixels of one height and width, the same on every machine.

Every random choice (crop, flip, caption) is a function of (seed, row, visit) through `diffzoo.rng.key`; nothing is
drawn from a global generator, so a resumed run shows each image as an uninterrupted one would.

The centre crop with resize="adm" is that of ADM (arXiv:2105.05233; Diffusion Models Beat GANs), which the field's
ImageNet numbers stand on: halve with a box filter while the short side is at least twice the target, then one bicubic
step. Unlike ADM, images are first turned as their EXIF tag says, and transparent ones are laid on white.
"""

from typing import Literal

import numpy as np
from PIL import Image

from diffzoo.data.decode import Pixels, decode
from diffzoo.rng import key
from diffzoo.sizes import Size, sides

__all__ = ["Crop", "Resize", "augment", "decode", "resize_crop", "uniform"]

Resize = Literal["adm", "area", "lanczos"]
Crop = Literal["center", "random"]

MIN_CROP_FRACTION = 0.8  # of the short side, for random crops; ADM's value
_METHODS = {"adm": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of all `parts`."""
    return key(*parts) / 2**63


def resize_crop(
    image: Image.Image, size: Size, resize: Resize = "adm", crop: Crop = "center", draws: tuple[float, ...] = ()
) -> Pixels:
    """A part of an image, uint8 `(h, w, channels)`, in memory channel after channel.

    Args:
        image: RGB, or of one channel.
        size: height and width of the part in pixels. The image is scaled to just cover them.
        resize: "adm" (see the module), "area" (one box-filter step) or "lanczos".
        crop: "center", or "random": what the image is scaled to cover is larger by a factor drawn from [1, 1 / 0.8],
            and the part cut out anywhere, as in ADM.
        draws: three numbers in [0, 1) that a random crop uses for scale, top and left.
    """
    rows, columns = sides(size)
    short = shorter = min(rows, columns)
    if crop == "random":
        longest = int(np.ceil(shorter / MIN_CROP_FRACTION))
        short = shorter + int(draws[0] * (longest + 1 - shorter))
    tall, wide = rows * short / shorter, columns * short / shorter  # to cover
    if resize == "adm":
        while image.width >= 2 * wide and image.height >= 2 * tall:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(wide / image.width, tall / image.height)
    width, height = round(image.width * factor), round(image.height * factor)
    if crop == "random":
        top, left = int(draws[1] * (height - rows + 1)), int(draws[2] * (width - columns + 1))
    else:
        top, left = (height - rows) // 2, (width - columns) // 2
    if width >= height and width > columns:
        # Pillow resizes along rows first, then along columns, but for tall images, where this depends on its version.
        # So the columns that the crop takes away need no second step.
        image = image.resize((width, image.height), _METHODS[resize]).crop((left, 0, left + columns, image.height))
        width, left = columns, 0
    image = image.resize((width, height), _METHODS[resize]).crop((left, top, left + columns, top + rows))
    bands = image.getbands()
    planes = bytearray().join([image.tobytes("raw", band) for band in bands])  # as batches lie in memory: one copy less
    return np.frombuffer(planes, np.uint8).reshape(len(bands), rows, columns).transpose(1, 2, 0)


def augment(seed: int, row: int, visit: int, crop: Crop, flip: bool) -> tuple[tuple[float, ...], bool]:
    """The random choices of one visit to one image: (draws of `resize_crop`, whether to mirror it)."""
    draws = tuple(uniform("crop", seed, row, visit, i) for i in range(3)) if crop == "random" else ()
    return draws, flip and uniform("flip", seed, row, visit) < 0.5
