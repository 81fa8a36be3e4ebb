"""From an encoded picture to a square of uint8 pixels, the same on every machine.

Every random choice (crop, flip, caption) is a function of (seed, row, visit) through `diffzoo.rng.key`; nothing is
drawn from a global generator, so a resumed run shows each picture as an uninterrupted one would.

The centre crop with resize="adm" is that of ADM (arXiv:2105.05233; Diffusion Models Beat GANs), which the field's
ImageNet numbers stand on: halve with a box filter while the short side is at least twice the target, then one bicubic
step. Unlike ADM, pictures are first turned as their EXIF tag says, and transparent ones are laid on white.
"""

import io
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffzoo.errors import UserError, did_you_mean
from diffzoo.rng import key

__all__ = ["Crop", "Resize", "augment", "check_choice", "decode", "resize_crop", "uniform"]

Resize = Literal["adm", "area", "lanczos"]
Crop = Literal["center", "random"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MIN_CROP_FRACTION = 0.8  # of the short side, for random crops; ADM's value
_MAGIC = {b"\xff\xd8\xff": ("JPEG", "MPO"), b"\x89PNG\r\n\x1a\n": ("PNG",), b"GIF8": ("GIF",)}
_METHODS = {"adm": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # more than eight bits per channel


def check_choice(name: str, value: str, kind: object) -> None:
    """Refuse a word that is not among those of a Literal type."""
    known = get_args(kind)
    if value not in known:
        raise UserError(f"{name} is one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of all `parts`."""
    return key(*parts) / 2**63


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey and float pictures to 8 bits. `convert` would clip them at 255."""
    values = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as RGB: grey repeated, transparency on white, 16 bits scaled, CMYK converted, EXIF turned."""
    if image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}:  # reading tags that are not there takes its time
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP:
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def decode(data: bytes, draft: int | None = None) -> Image.Image:
    """An encoded picture as RGB.

    Args:
        data: the file's bytes, in any format that Pillow reads.
        draft: let the JPEG decoder scale down by 2, 4 or 8, to no less than this short side in pixels. About twice as
            fast on photographs; pixels differ slightly from those of a full decode.

    Raises:
        OSError, SyntaxError, ValueError: the data is truncated or no picture.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_format(data))
    except UnidentifiedImageError:  # names the buffer's place in memory
        raise UnidentifiedImageError("no picture in a format that Pillow reads") from None
    if draft is not None and image.format == "JPEG":
        _draft(image, draft)
    image.load()
    return to_rgb(image)


def _format(data: bytes) -> tuple[str, ...] | None:
    """The format by its first bytes, which spares Pillow from trying them all; None: unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ("WEBP",)
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def _draft(image: Image.Image, short: int) -> None:
    factor = min(image.size) // short
    if factor >= 2:
        image.draft("RGB", (image.width // factor, image.height // factor))


def resize_crop(
    image: Image.Image, size: int, resize: Resize = "adm", crop: Crop = "center", draws: tuple[float, ...] = ()
) -> Pixels:
    """A square of `size` pixels, uint8 `(size, size, 3)`, in memory channel after channel.

    Args:
        image: RGB.
        size: side of the square in pixels.
        resize: "adm" (see the module), "area" (one box-filter step) or "lanczos".
        crop: "center", or "random": the short side is scaled to a length drawn from [size, size / 0.8] and the square
            cut out anywhere, as in ADM.
        draws: three numbers in [0, 1) that a random crop uses for scale, top and left.
    """
    short = size
    if crop == "random":
        longest = int(np.ceil(size / MIN_CROP_FRACTION))
        short = size + int(draws[0] * (longest + 1 - size))
    if resize == "adm":
        while min(image.size) >= 2 * short:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = short / min(image.size)
    width, height = round(image.width * factor), round(image.height * factor)
    if crop == "random":
        top, left = int(draws[1] * (height - size + 1)), int(draws[2] * (width - size + 1))
    else:
        top, left = (height - size) // 2, (width - size) // 2
    if width >= height and width > size:
        # Pillow resizes along rows first, then along columns, but for tall pictures, where this depends on its version.
        # So the columns that the crop takes away need no second step.
        image = image.resize((width, image.height), _METHODS[resize]).crop((left, 0, left + size, image.height))
        width, left = size, 0
    image = image.resize((width, height), _METHODS[resize]).crop((left, top, left + size, top + size))
    planes = bytearray().join([image.tobytes("raw", band) for band in "RGB"])  # as batches lie in memory: one copy less
    return np.frombuffer(planes, np.uint8).reshape(3, size, size).transpose(1, 2, 0)


def augment(seed: int, row: int, visit: int, crop: Crop, flip: bool) -> tuple[tuple[float, ...], bool]:
    """The random choices of one visit to one picture: (draws of `resize_crop`, whether to mirror it)."""
    draws = tuple(uniform("crop", seed, row, visit, i) for i in range(3)) if crop == "random" else ()
    return draws, flip and uniform("flip", seed, row, visit) < 0.5
