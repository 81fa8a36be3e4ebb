"""Raw pixels, images in [-1, 1], grids and PNG files: the one place where images are scaled and rounded."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.files import atomic_path

__all__ = ["SUFFIXES", "make_grid", "save_grid", "save_png", "to_float", "to_uint8"]

# of image files, in lower case
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Raw pixels 0…255 as images in [-1, 1], on the device where they are."""
    return pixels.to(dtype) / 127.5 - 1


def to_uint8(images: Tensor, rounding: str = "round") -> Tensor:
    """Images in [-1, 1] as raw pixels 0…255; what lies outside is clamped.

    Args:
        images: of any shape.
        rounding: "round" to the nearest level, or "truncate" to the one below, half a grey level darker on average.
    """
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def make_grid(pixels: Tensor, columns: int, margin: int = 2) -> Tensor:
    """Raw pixels `(n, c, h, w)` as one picture `(3, H, W)`, row by row, on white.

    Args:
        pixels: uint8; one channel is repeated to three, more than three are cut to three.
        columns: pictures per row.
        margin: pixels between pictures.
    """
    n, c, h, w = pixels.shape
    pixels = pixels.expand(n, 3, h, w) if c == 1 else pixels[:, :3]
    rows = -(-n // columns)
    blank = pixels.new_full((rows * columns - n, 3, h, w), 255)
    cells = F.pad(torch.cat([pixels, blank]), (margin, 0, margin, 0), value=255)
    cells = cells.reshape(rows, columns, 3, h + margin, w + margin)
    picture = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * (h + margin), columns * (w + margin))
    return F.pad(picture, (0, margin, 0, margin), value=255)


def save_png(pixels: Tensor, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> Path:
    """Write raw pixels `(3, h, w)` as PNG, under a temporary name first.

    Args:
        pixels: uint8.
        path: where; folders are made.
        text: what to record in the file, for example how the picture was made.

    Raises:
        UserError: if the folder cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    try:
        with atomic_path(path) as temporary:
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(temporary, "PNG", pnginfo=info)
    except OSError as error:
        raise UserError(f"could not write the picture {path}: {error.strerror or error}") from error
    return path


def save_grid(
    images: Tensor, path: str | os.PathLike[str], columns: int, text: Mapping[str, str] | None = None
) -> Tensor:
    """Write images in [-1, 1] `(n, c, h, w)` as one PNG grid; returns the picture, uint8 `(3, H, W)`."""
    grid = make_grid(to_uint8(images), columns)
    save_png(grid, path, text)
    return grid
