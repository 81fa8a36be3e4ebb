"""Progress bars that move on a terminal and in a notebook, and are a line a minute elsewhere."""

import math
import sys
from typing import Any, Protocol, Self, runtime_checkable

from tqdm import tqdm

__all__ = ["Bar", "moves", "progress_bar"]

LINE_EVERY = 60.0  # seconds


class _Lines:
    """Standard error, with each refresh of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if plain := text.strip():
            sys.stderr.write(plain + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@runtime_checkable
class Bar(Protocol):
    """What is used of a bar."""

    n: float

    def update(self, n: float) -> object: ...

    def refresh(self) -> object: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> object: ...


def moves() -> bool:
    """Whether a line can be written over: on a terminal and in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def progress_bar(total: int | None, shown: bool | None = True, **options: Any) -> Bar:
    """A bar of tqdm.

    Args:
        total: of what is counted; None = unknown.
        shown: False = nothing is printed; None = a bar in notebooks alone.
        options: of `tqdm.tqdm`.
    """
    if not moves():
        options |= {"file": _Lines(), "mininterval": LINE_EVERY, "maxinterval": math.inf, "delay": LINE_EVERY}
    if shown is None:
        shown = _in_notebook()
    bar: Bar = tqdm(total=total, disable=not shown, **options)
    return bar
