"""From an encoded image to RGB, or to as many channels as are asked for, of eight bits each.

Pillow reads nearly every format, but it cuts 16-bit values in several channels to their high byte, and the bands of
satellites and microscopes to three channels. Such images are read here as arrays and scaled by a value range: the one
that the file states, or the smallest usual one that holds the data.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from diffzoo.data.tiff import ALPHA, BITS, EXTRA, PHOTOMETRIC, SAMPLES, is_tiff, read_bands, tiff_tags
from diffzoo.files import HEAD, what_is

__all__ = ["Bands", "ValueRange", "decode", "decode_bands", "has_more_frames", "load", "range_of"]

Pixels = NDArray[np.uint8]
ValueRange = tuple[float, float]

_MAGIC = {b"\xff\xd8\xff": ("JPEG", "MPO"), b"\x89PNG\r\n\x1a\n": ("PNG",), b"GIF8": ("GIF",)}
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # more than eight bits, in one channel
_TOPS = (1, 255, 1023, 4095, 16383, 65535)


@dataclass(frozen=True)
class Bands:
    """Pixel values that an 8-bit Pillow image cannot hold.

    values: `(h, w, channels)`.
    stated: what becomes 0 and 255, where the file says so.
    alpha:  whether the last channel is opacity.
    negative: whether low values are bright.
    colour: whether the first three are red, green and blue.
    """

    values: np.ndarray
    stated: ValueRange | None = None
    alpha: bool = False
    colour: bool = False
    negative: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as of an image of Pillow."""
        return self.values.shape[1], self.values.shape[0]

    @property
    def deep(self) -> bool:
        """Whether values have more than eight bits."""
        return bool(self.values.dtype != np.uint8)

    def extremes(self) -> ValueRange:
        """The smallest and the largest value without opacity; the range always includes 0."""
        shown = self.values[..., :-1] if self.alpha else self.values
        known = shown[np.isfinite(shown)] if shown.dtype.kind == "f" else shown
        return float(known.min(initial=0)), float(known.max(initial=0))

    def eight_bit(self, value_range: ValueRange | None) -> Pixels:
        """Values as uint8: those outside the range are clipped, NaN is its low end. Opacity keeps its full range."""
        if not self.deep:
            return self.values
        low, high = value_range or self.stated or range_of(*self.extremes())
        finite = np.nan_to_num(self.values.astype(np.float64), nan=low, posinf=high, neginf=low)
        scaled = (finite - low) * (255 / ((high - low) or 1))
        if self.negative:
            scaled = 255 - scaled
        if self.alpha:
            kind = self.values.dtype
            scaled[..., -1] = self.values[..., -1] * (255 / (np.iinfo(kind).max if kind.kind in "ui" else 1))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    def image(self, value_range: ValueRange | None) -> Image.Image | None:
        """Grey, RGB and the two with transparency as an image of eight bits; None for other channels."""
        count = self.values.shape[2]
        mode = {1: "L", 3: "RGB"}.get(count) if not self.alpha else {2: "LA", 4: "RGBA"}.get(count)
        if mode is None:
            return None
        pixels = self.eight_bit(value_range)
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if count == 1 else pixels), mode)


def range_of(low: float, high: float) -> ValueRange:
    """The values that become 0 and 255: the smallest usual range that holds the data between two extremes.

    Usual are 0 to 1, 255 and the largest of 10, 12, 14 and 16 bits, and -1 to 1; of others their extremes.
    """
    if low >= -0.05:
        return 0.0, next((float(top) for top in _TOPS if high <= top * (1.5 if top == 1 else 1)), high)
    return (-1.0, 1.0) if low >= -1.5 and high <= 1.5 else (low, high)


# -- reading


def load(data: bytes, draft: int | None = None) -> Image.Image | Bands:
    """A decoded 8-bit image, turned as its EXIF tag says, or the `Bands` of an image that is no such.

    Args:
        data: the file's bytes, in any format that Pillow reads, or NPY, or TIFF with any number of bands.
        draft: see `decode_bands`.

    Raises:
        OSError, SyntaxError, ValueError: the data is truncated or no image.
    """
    if data[:6] == b"\x93NUMPY":
        return _array(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6"):
        return _deep_png(data)
    if is_tiff(data) and (found := _tiff(data)) is not None:
        return found
    try:
        image = Image.open(io.BytesIO(data), formats=_format(data))
    except UnidentifiedImageError:  # names the buffer's place in memory
        raise UnidentifiedImageError(what_is(data[:HEAD], "no image in a format that Pillow reads")) from None
    if draft is not None and image.format == "JPEG":
        _draft(image, draft)
    image.load()
    if image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}:  # reading tags that are not there takes its time
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _DEEP:
        tags = getattr(image, "tag_v2", {})
        return Bands(np.asarray(image)[..., None], _stated(tags), negative=tags.get(PHOTOMETRIC) == 0)
    return image


def has_more_frames(data: bytes) -> bool:
    """Whether a file holds more than the frame or page that is read. Second images in JPEG files are no frames."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format != "MPO" and getattr(image, "is_animated", False)


def _array(data: bytes) -> Bands:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.ndim} dimensions of {array.dtype} is no image")
    array = array[..., None] if array.ndim == 2 else array
    return Bands(array.transpose(1, 2, 0) if array.shape[0] < min(array.shape[1:]) else array)


def _deep_png(data: bytes) -> Bands:
    """A PNG of 16 bits in several channels. Pillow keeps one byte of each value: it is read twice, for both."""
    halves = []
    for byte in ("B", "L"):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode == "LA":  # as four channels of eight bits, which are the bytes
                image._mode = "RGBA"
            mode = "RGBA" if data[25:26] == b"\4" else f"{image.mode};16{byte}"
            image.tile = [part._replace(args=mode) for part in image.tile]
            halves.append(np.asarray(image).astype(np.uint16))
    high, low = halves
    if data[25:26] == b"\4":
        high, low = high[..., ::2], low[..., 1::2]
    values = high << 8 | low
    return Bands(values, alpha=values.shape[2] != 3, colour=values.shape[2] > 2)


def _tiff(data: bytes) -> Bands | None:
    """A TIFF with deep values, or with other channels than colours; None: Pillow reads it right."""
    tags = tiff_tags(data)
    count, bits, colour = int(tags.get(SAMPLES, (1,))[0]), int(tags.get(BITS, (1,))[0]), tags.get(PHOTOMETRIC, (1,))[0]
    alpha = tags.get(EXTRA, (0,))[-1] in ALPHA
    usual = (count == 3 and colour == 2) or (count in (2, 4) and alpha)
    usual |= count == 1
    if colour not in (1, 2) or (bits <= 8 and usual) or (count == 1 and bits % 8):
        return None
    return Bands(read_bands(data, tags), _stated(tags), alpha, colour == 2)


def _stated(tags: Mapping[int, float | Sequence[float]]) -> ValueRange | None:
    """The range that a TIFF states: its tags for the extremes of samples, or fewer bits than they are stored in."""

    def first(*names: int) -> float | None:
        found = next((tags[n] for n in names if n in tags), None)
        return float(found[0] if isinstance(found, Sequence) else found) if found is not None else None

    top, bits = first(341, 281), first(BITS)
    if top:
        return first(340, 280) or 0.0, top
    return (0.0, 2.0**bits - 1) if bits and 8 < bits < 16 else None


def _format(data: bytes) -> tuple[str, ...] | None:
    """The format by its first bytes, which spares Pillow from trying them all; None: unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ("WEBP",)
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def _draft(image: Image.Image, short: int) -> None:
    factor = min(image.size) // short
    if factor >= 2:
        image.draft("RGB", (image.width // factor, image.height // factor))


# -- channels


def decode(data: bytes, draft: int | None = None, value_range: ValueRange | None = None) -> Image.Image:
    """An encoded image as RGB: `decode_bands` with three channels."""
    return decode_bands(data, 3, draft, value_range)[0]


def decode_bands(
    data: bytes, channels: int, draft: int | None = None, value_range: ValueRange | None = None
) -> list[Image.Image]:
    """An encoded image as one RGB image, for three channels, or as 8-bit images of one channel each.

    Args:
        data: see `load`.
        channels: 1: grey, transparency on white; 3: RGB; 2 and 4: grey and RGB with transparency, opaque where there is
            none; more: bands as they are.
        draft: let the JPEG decoder scale down by 2, 4 or 8, to no less than this short side in pixels. About twice as
            fast on photographs; pixels differ slightly from those of a full decode.
        value_range: what becomes 0 and 255 in images of more than eight bits; None: see `range_of`.

    Raises:
        OSError, SyntaxError, ValueError: the data is truncated or no image, or has another number of channels.
    """
    found = load(data, draft)
    if isinstance(found, Bands):
        count = found.values.shape[2]
        if count == channels != 3 and not found.alpha:
            pixels = found.eight_bit(value_range)
            return [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(channels)]
        if count == 4 and channels == 3 and found.colour and not found.alpha:  # a band beside the colours
            found = Bands(found.values[..., :3], found.stated, colour=True)
        image = found.image(value_range)
        if image is None:
            raise ValueError(f"{count} channels, expected {channels}: set channels of the data")
    else:
        image = found
    if channels == 3:
        return [_rgb(image)]
    if channels == 1:
        return [image if image.mode == "L" else _rgb(image).convert("L")]
    if channels not in (2, 4):
        raise ValueError(f"{len(image.getbands())} channels, expected {channels}: set channels of the data")
    return list(image.convert("LA" if channels == 2 else "RGBA").split())


def _rgb(image: Image.Image) -> Image.Image:
    """Any image of eight bits as RGB: grey repeated, transparency on white, CMYK converted."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")
