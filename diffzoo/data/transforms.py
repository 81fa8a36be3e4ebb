"""From an encoded image to uint8 pixels of one height and width, the same on every machine.

Every random choice (crop, flip, caption) is a function of (seed, row, visit) through `diffzoo.rng.key`; nothing is
drawn from a global generator, so a resumed run shows each image as an uninterrupted one would.

The centre crop with resize="adm" is that of ADM (arXiv:2105.05233; Diffusion Models Beat GANs), which the field's
ImageNet numbers stand on: halve with a box filter while the short side is at least twice the target, then one bicubic
step. Unlike ADM, images are first turned as their EXIF tag says, and transparent ones are laid on white.
"""

import io
import zlib
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffzoo.errors import UserError, did_you_mean
from diffzoo.rng import key
from diffzoo.sizes import Size, sides

__all__ = [
    "Crop",
    "Resize",
    "ValueRange",
    "augment",
    "check_choice",
    "decode",
    "decode_bands",
    "load",
    "resize_crop",
    "uniform",
]

Resize = Literal["adm", "area", "lanczos"]
Crop = Literal["center", "random"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
ValueRange = tuple[float, float]

MIN_CROP_FRACTION = 0.8  # of the short side, for random crops; ADM's value
_MAGIC = {b"\xff\xd8\xff": ("JPEG", "MPO"), b"\x89PNG\r\n\x1a\n": ("PNG",), b"GIF8": ("GIF",)}
_METHODS = {"adm": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # more than eight bits per channel
_TOPS = (1, 255, 1023, 4095, 16383, 65535)


def check_choice(name: str, value: str, kind: object) -> None:
    """Refuse a word that is not among those of a Literal type."""
    known = get_args(kind)
    if value not in known:
        raise UserError(f"{name} is one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of all `parts`."""
    return key(*parts) / 2**63


def range_of(values: np.ndarray[Any, Any]) -> ValueRange:
    """The values that become 0 and 255: the smallest usual range that holds the data.

    Usual are 0 to 1, 255 and the largest of 10, 12, 14 and 16 bits, and -1 to 1; of others their extremes.
    """
    low, high = extremes(values)
    if low >= -0.05:
        return 0.0, next((float(top) for top in _TOPS if high <= top * (1.5 if top == 1 else 1)), high)
    return (-1.0, 1.0) if low >= -1.5 and high <= 1.5 else (low, high)


def extremes(values: np.ndarray[Any, Any]) -> ValueRange:
    """The smallest and the largest value; at most and at least 0."""
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return float(known.min(initial=0)), float(known.max(initial=0))


def _eight_bit(values: np.ndarray[Any, Any], value_range: ValueRange | None) -> Pixels:
    """Deep pixels as uint8; what lies outside of the range is clipped, and NaN is its low end."""
    low, high = range_of(values) if value_range is None else value_range
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / ((high - low) or 1))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Any PIL image as RGB: grey repeated, transparency on white, deep pixels scaled, CMYK converted, EXIF turned."""
    if image.mode in _DEEP:
        image = Image.fromarray(_eight_bit(np.asarray(image), value_range or stated_range(image)))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def stated_range(image: Image.Image) -> ValueRange | None:
    """The range that a TIFF states: its tags for the extremes of samples, or fewer bits than they are stored in."""
    tags: Any = getattr(image, "tag_v2", {})

    def first(*names: int) -> float | None:
        found = next((tags[n] for n in names if n in tags), None)
        return float(found[0] if isinstance(found, tuple) else found) if found is not None else None

    top, bits = first(341, 281), first(258)
    if top:
        return first(340, 280) or 0.0, top
    return (0.0, 2.0**bits - 1) if bits and 8 < bits < 16 else None


def load(data: bytes, draft: int | None = None) -> "Image.Image | np.ndarray[Any, Any]":
    """A decoded image, turned as its EXIF tag says; an array `(h, w, channels)` of what Pillow does not read.

    Args:
        data: the file's bytes, in any format that Pillow reads, or NPY, or TIFF with any number of bands.
        draft: see `decode`.

    Raises:
        OSError, SyntaxError, ValueError: the data is truncated or no image.
    """
    if data[:6] == b"\x93NUMPY":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.ndim not in (2, 3):
            raise ValueError(f"an array of {array.ndim} dimensions is no image")
        array = array[..., None] if array.ndim == 2 else array
        return array.transpose(1, 2, 0) if array.shape[0] < min(array.shape[1:]) else array
    try:
        image = Image.open(io.BytesIO(data), formats=_format(data))
        if draft is not None and image.format == "JPEG":
            _draft(image, draft)
        image.load()
    except UnidentifiedImageError:  # names the buffer's place in memory
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data)
        raise UnidentifiedImageError("no image in a format that Pillow reads") from None
    if image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}:  # reading tags that are not there takes its time
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _tiff(data: bytes) -> np.ndarray[Any, Any]:
    """The bands `(h, w, channels)` of a TIFF in strips, plain or deflated."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    width, height, bands = int(tags[256]), int(tags[257]), int(tags.get(277, 1))
    unpack: Any = {1: bytes, 8: zlib.decompress, 32946: zlib.decompress}.get(tags.get(259, 1))
    if unpack is None or 273 not in tags:
        raise ValueError(
            f"a TIFF of {bands} bands in tiles, or of compression {tags.get(259)}: write it in plain strips"
        )
    kind = {1: "u", 2: "i", 3: "f"}[tags.get(339, (1,))[0]]
    dtype = np.dtype(f"{'<' if data[:2] == b'II' else '>'}{kind}{tags[258][0] // 8}")
    strips = b"".join(unpack(data[at : at + size]) for at, size in zip(tags[273], tags[279], strict=True))
    planar = tags.get(284, 1) == 2
    array = np.frombuffer(strips, dtype).reshape((bands, height, width) if planar else (height, width, bands))
    array = array.transpose(1, 2, 0) if planar else array
    return np.cumsum(array, axis=1, dtype=array.dtype) if tags.get(317, 1) == 2 else array


def decode(data: bytes, draft: int | None = None, value_range: ValueRange | None = None) -> Image.Image:
    """An encoded image as RGB.

    Args:
        data: see `load`.
        draft: let the JPEG decoder scale down by 2, 4 or 8, to no less than this short side in pixels. About twice as
            fast on photographs; pixels differ slightly from those of a full decode.
        value_range: what becomes 0 and 255 in images of more than eight bits; None: see `range_of`.

    Raises:
        OSError, SyntaxError, ValueError: the data is truncated or no image.
    """
    bands = decode_bands(data, 3, draft, value_range)
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def decode_bands(
    data: bytes, channels: int, draft: int | None = None, value_range: ValueRange | None = None
) -> list[Image.Image]:
    """An encoded image as one RGB image, for three channels, or as 8-bit images of one channel each.

    Args:
        channels: 1: grey, transparency on white; 3: RGB; 2 and 4: grey and RGB with transparency, opaque where there is
            none; more: bands as they are.

    Raises:
        ValueError: the image has another number of channels.
    """
    image = load(data, draft)
    if not isinstance(image, Image.Image):
        if image.shape[2] == 1 and channels == 3:
            image = np.repeat(image, 3, axis=2)
        if image.shape[2] != channels:
            raise ValueError(f"{image.shape[2]} channels, expected {channels}: set channels of the data")
        pixels = image if image.dtype == np.uint8 else _eight_bit(image, value_range)
        return [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(channels)]
    if channels == 3:
        return [to_rgb(image, value_range)]
    if image.mode in _DEEP:
        image = Image.fromarray(_eight_bit(np.asarray(image), value_range or stated_range(image)))
    if channels == 1:
        return [image if image.mode == "L" else to_rgb(image).convert("L")]
    if channels not in (2, 4):
        raise ValueError(f"{len(image.getbands())} channels, expected {channels}: set channels of the data")
    return list(image.convert("LA" if channels == 2 else "RGBA").split())


def is_deep(image: "Image.Image | np.ndarray[Any, Any]") -> bool:
    """Whether an image that `load` gave has more than eight bits per channel."""
    return image.mode in _DEEP if isinstance(image, Image.Image) else image.dtype != np.uint8


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
