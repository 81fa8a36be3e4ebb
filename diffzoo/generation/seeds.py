"""Seeds as people write them, and how many images may be asked for at once."""

import re

from diffzoo.errors import UserError

__all__ = ["bounded", "parse_seeds"]

MOST = 100_000  # images that one call holds in memory


def parse_seeds(text: str) -> list[int]:
    """Seeds written as "0-7", "3" or "0-15,20".

    Raises:
        UserError: for anything else.
    """
    parts: list[range] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(f"expected seeds such as 0-7 or 0-15,20, got {text!r}")
        parts.append(range(first, last + 1))
    bounded(sum(part.stop - part.start for part in parts))
    return [seed for part in parts for seed in part]


def bounded(count: int) -> None:
    """Refuse more images than a command holds in memory at once."""
    if count > MOST:
        raise UserError(
            f"{count} images are more than {MOST} at a time: give fewer seeds, or `diffzoo eval MODEL --keep-images`, "
            "which writes them in blocks"
        )
