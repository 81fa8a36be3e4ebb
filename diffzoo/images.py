"""Images in and out: [-1, 1] to raw pixels and back, grids and image files, in one place so that all are rounded alike.

Everything that is written or measured passes through `to_uint8`, which refuses values that are not finite.
"""

import io
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.files import atomic_path, write_text

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

__all__ = [
    "SUFFIXES",
    "Rounding",
    "check_format",
    "enlarged",
    "make_grid",
    "png_bytes",
    "save_image",
    "to_float",
    "to_uint8",
]

# of the image files that are read, in lower case
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)
# of those that are written: the format, and how it is saved
_FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
_EXIF_DESCRIPTION = 0x010E

SEEN = 128  # height or width in pixels to which `make_grid` enlarges, fourfold at most
LINE = 14  # height of a line of text in a grid, in pixels
LINES = 2  # of a label at most

Rounding = Literal["round", "truncate"]


def to_uint8(images: Tensor, rounding: Rounding = "round", first: int = 0) -> Tensor:
    """Raw pixels, uint8, from images in [-1, 1]; raw pixels pass unchanged.

    Args:
        images: `(b, c, h, w)`; values beyond the range are clamped.
        rounding: "round" to the nearest of 0..255; "truncate" as ADM's sampling scripts do, half a grey level darker on
            average.
        first: number of the first image in the run, for the message.

    Raises:
        UserError: if a value is not finite: says in how many images, and which is the first.
    """
    if images.dtype == torch.uint8:
        return images
    finite = torch.isfinite(images)
    if not finite.all():
        bad = ~finite.reshape(len(images), -1).all(dim=1)
        number = first + int(bad.nonzero()[0])
        raise UserError(
            f"{int(bad.sum())} of {len(images)} images hold values that are not finite (NaN), the first is image "
            f"{number} of the run: the weights are broken, or the precision is too low (try fp32)"
        )
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """Raw pixels 0...255 as images in [-1, 1], on the device where they are."""
    return pixels.float() / 127.5 - 1


def enlarged(pixels: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c H W"]:
    """Images large enough to be seen, each pixel a square: 32 pixels become 128, and images of 128 stay as they are."""
    factor = min(4, max(1, SEEN // min(pixels.shape[-2:])))
    return pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def make_grid(
    pixels: UInt8[Tensor, "n c h w"],
    columns: int,
    margin: int = 2,
    labels: Sequence[str] = (),
    heads: Sequence[str] = (),
) -> UInt8[Tensor, "3 H W"]:
    """Raw pixels as one image, row by row, on white; small images are enlarged.

    Args:
        pixels: grey is repeated to three channels, of more than three the first three are shown.
        columns: images per row.
        margin: pixels between images.
        labels: what to write below each image, in lines of its width; none by default.
        heads: what to write above each column, likewise; none by default.
    """
    n, c = pixels.shape[:2]
    pixels = enlarged(pixels[:, :3] if c > 2 else pixels[:, :1])
    h, w = pixels.shape[-2:]
    pixels = pixels.expand(n, 3, h, w)
    rows = -(-n // columns)
    font = _font()
    under = [_wrapped(label, w, font) for label in labels[:n]]
    over = [_wrapped(head, w, font) for head in heads]
    below, above = (LINE * max(map(len, texts), default=0) for texts in (under, over))
    blank = pixels.new_full((rows * columns - n, 3, h, w), 255)
    cells = F.pad(torch.cat([pixels, blank]), (margin, 0, margin, below), value=255)
    h, w = h + margin + below, w + margin
    cells = cells.reshape(rows, columns, 3, h, w)
    grid = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * h, columns * w)
    grid = F.pad(grid, (0, margin, above, margin), value=255)
    places = [(i // columns * h + h + above - below, i % columns * w + margin) for i in range(n)]
    written = [(*place, lines) for place, lines in zip(places, under, strict=False)]
    written += [(0, column * w + margin, lines) for column, lines in enumerate(over)]
    return _with_text(grid, written, font) if below or above else grid


def _font() -> "Font":
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", LINE - 4)  # of more scripts than the one in Pillow
    except OSError:
        return ImageFont.load_default(LINE - 4)


def _wrapped(text: str, width: int, font: "Font") -> list[str]:
    """Up to `LINES` lines of a width; what is longer is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and (len(lines) == LINES or font.getlength(f"{lines[-1]} {word}") <= width):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: "Font") -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _with_text(grid: Tensor, written: Iterable[tuple[int, int, list[str]]], font: "Font") -> Tensor:
    """The grid with lines of text from (top, left) down."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(grid.permute(1, 2, 0).contiguous().cpu().numpy())
    draw = ImageDraw.Draw(image)
    for top, left, lines in written:
        for number, line in enumerate(lines):
            draw.text((left, top + 1 + LINE * number), line, fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_image(pixels: Tensor, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> Path:
    """Write raw pixels `(c, h, w)` to an image file of the format that its name says, under a temporary name first.

    Args:
        pixels: uint8; grey, RGB, each also with transparency. Of more channels `.npy` alone takes `(h, w, c)`.
        path: ends in .png, .webp (lossless) or .jpg (quality 95); folders are made.
        text: what to record in the file, for example how the image was made: text chunks of a PNG, the EXIF image
            description of others; beside an array, files of these names behind its own.

    Raises:
        UserError: for another suffix, or if the folder cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
    if path.suffix == ".npy":
        return _save_array(array, path, text or {})
    check_format(path)
    format_, options = _FORMATS[path.suffix.lower()]
    if format_ == "PNG":
        info = PngInfo()
        for key, value in (text or {}).items():
            info.add_itxt(key, value)
        options = {"pnginfo": info}
    elif text:
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = "\n".join(text.values())
        options = {**options, "exif": exif}
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(temporary, format_, **options)
    except OSError as error:
        raise UserError(f"could not write the image {path}: {error.strerror or error}") from error
    return path


def _save_array(array: np.ndarray, path: Path, text: Mapping[str, str]) -> Path:
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
        for key, value in text.items():
            write_text(path.with_suffix(f".{key}.json"), value)
    except OSError as error:
        raise UserError(f"could not write the image {path}: {error.strerror or error}") from error
    return path


def png_bytes(pixels: UInt8[Tensor, "3 h w"]) -> bytes:
    """Raw pixels as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG")
    return file.getvalue()


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise a `UserError` unless images can be written to a file of this name."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise UserError(f"images are written as {', '.join(_FORMATS)}, got the file name {str(path)!r}")


def write_gif(path: str | os.PathLike[str], frames: Sequence[Tensor], milliseconds: Sequence[int]) -> Path:
    """Write an animation without end: raw pixels `(3, h, w)` of each frame, and how long it is shown."""
    from PIL import Image

    first, *others = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    try:
        with atomic_path(path) as temporary:
            first.save(temporary, "GIF", save_all=True, append_images=others, duration=list(milliseconds), loop=0)
    except OSError as error:
        raise UserError(f"could not write the animation {path}: {error.strerror or error}") from error
    return Path(path)


def write_npz(path: str | os.PathLike[str], pixels: Iterable[Tensor], n: int, labels: Tensor | None = None) -> Path:
    """Write an ADM-style `.npz` piece by piece: `arr_0` uint8 NHWC, and `arr_1` if there are labels.

    Args:
        path: where.
        pixels: raw pixels `(b, 3, h, w)`, piece by piece, `n` in all.
        n: number of images.
        labels: class indices `(n,)`.

    Raises:
        UserError: if the pieces do not add up to `n`.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        written = 0
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for part in pixels:
                rows = part.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(rows.tobytes())
                written += len(rows)
        if written != n:
            raise UserError(f"expected {n} images to write, got {written}")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().numpy())
    return Path(path)
