"""Errors that a user can act on: one sentence that says what was expected, what came and what to do."""

import difflib
from collections.abc import Iterable, Iterator
from typing import get_args

__all__ = ["MissingExtraError", "UserError", "causes", "check_choice", "did_you_mean", "lacks"]


class UserError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback, and exits with status 2."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': install it with `pip install diffzoo[{extra}]`")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it, the last one raised first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A hint to append to a message: the nearest of `choices`, or all of them when they are few; case is no matter."""
    known = sorted(str(c) for c in choices)
    folded = {c.casefold(): c for c in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.55)
    if near:
        return f"; did you mean {' or '.join(repr(folded[n]) for n in near)}?"
    if len(known) <= 12:
        return f"; known: {', '.join(known)}" if known else ""
    return ""


def check_choice(name: str, value: object, kind: object) -> None:
    """Refuse what is not among the words of a Literal type."""
    known = get_args(kind)
    if value not in known:
        raise UserError(f"expected {name} to be one of {', '.join(map(repr, known))}, got {value!r}")


def lacks(part: object, method: str) -> UserError:
    """The error for a class of one's own that does not have a method of its base."""
    return UserError(f"{type(part).__module__}.{type(part).__qualname__} lacks the method {method!r}")
