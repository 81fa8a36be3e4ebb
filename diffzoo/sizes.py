"""Height and width of images in pixels: one number for a square, (height, width) for any other rectangle."""

import math
import re

from diffzoo.errors import UserError

__all__ = ["Size", "as_size", "mean_side", "pixels_text", "scaled", "sides", "size_text"]

Size = int | tuple[int, int]


def as_size(value: object, name: str = "image_size") -> Size:
    """A size in its one form: a whole number for squares, a pair for others.

    Args:
        value: a number, (height, width), or text such as "64" or "96x64".
        name: of the setting, for the message.

    Raises:
        UserError: it is none of these.
    """
    parts: list[object] = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*[x×]\s*\d+)?\s*", value):
        parts = [int(part) for part in re.findall(r"\d+", value)]
    known = [part for part in parts if isinstance(part, int) and not isinstance(part, bool) and part > 0]
    if len(known) != len(parts) or len(parts) not in (1, 2):
        raise UserError(f"{name}: expected a positive whole number, or height and width such as 96x64, got {value!r}")
    return known[0] if known[0] == known[-1] else (known[0], known[1])


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def scaled(size: Size, ratio: int) -> Size:
    """A size times a whole number."""
    return as_size([side * ratio for side in sides(size)])


def size_text(size: Size) -> str:
    """For people: "64" or "96x64", height first."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def pixels_text(size: Size) -> str:
    """For people, where the word pixels follows: "64x64", height first."""
    return "x".join(map(str, sides(size)))


def mean_side(size: float | tuple[float, float]) -> float:
    """The side of the square with as many pixels: the geometric mean of height and width."""
    return math.sqrt(size[0] * size[1]) if isinstance(size, tuple) else size
