"""Checks annotations at run time: `pytest --jaxtyping-packages=diffzoo.process,typecheck.checked tests/process`."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked; as it is where it returns `Self`, which needs a class."""
    try:
        return _strict(function)
    except BeartypeDecorHintPep673Exception:
        return function
