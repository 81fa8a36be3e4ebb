"""Errors that a user can act on: one sentence that says what was expected, what came and what to do."""

import difflib
from collections.abc import Iterable, Iterator
from typing import get_args

__all__ = ["MissingExtraError", "UserError", "causes", "check_choice", "did_you_mean", "lacks", "nearest"]


class UserError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback, and exits with status 2."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        install = f'pip install "diffzoo[{extra}]"'  # zsh takes brackets without quotes for a pattern
        super().__init__(f"{purpose} needs the package '{package}': install it with `{install}`")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it, the last one raised first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def did_you_mean(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """A hint to append to a message: the nearest of `choices`, or all of them where none is near and they are few.

    `prefix` stands before each of the nearest, and is not compared.
    """
    known = sorted(str(c) for c in choices)
    few = f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""
    return nearest(name, known, prefix) or few


def nearest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """The hint for a message that lists all choices: the nearest, if any; case and dashes of options are no matter."""
    folded = {c.casefold().lstrip("-"): c for c in choices}
    near = difflib.get_close_matches(str(name).casefold().lstrip("-"), folded, n=3, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(prefix + folded[n]) for n in near)}?" if near else ""


def check_choice(name: str, value: object, kind: object) -> None:
    """Refuse what is not among the words of a Literal type."""
    known = get_args(kind)
    if value not in known:
        hint = nearest(value, map(str, known)) if isinstance(value, str) else ""
        raise UserError(f"expected {name} to be one of {', '.join(map(repr, known))}, got {value!r}{hint}")


def lacks(part: object, method: str) -> UserError:
    """The error for a class of one's own that does not have a method of its base."""
    return UserError(f"{type(part).__module__}.{type(part).__qualname__} lacks the method {method!r}")
