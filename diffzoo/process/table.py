"""Coefficients at the times of a grid, computed once and kept from batch to batch.

Samplers walk the same few hundred times in every batch, where the coefficients of a process are scalars, float64 on the
CPU. Computing them takes longer than the arithmetic on the images of a small batch. They stay on the CPU: a kernel on
any device takes a scalar from there as an argument, without a copy that it would have to wait for.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

__all__ = ["on_device", "tabulated"]

P = ParamSpec("P")
R = TypeVar("R")

_LIMIT = 1 << 15
_table: dict[tuple[object, ...], tuple[tuple[object, ...], object]] = {}


def tabulated(function: Callable[P, R]) -> Callable[P, R]:
    """Remember the results of a function for arguments that are the same objects again.

    Calls with a tensor that is no scalar on the CPU are computed each time, as those of a training step are. A tensor
    must not be changed in place once it was an argument.
    """

    @wraps(function)
    def at(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            return function(*args, **kwargs)
        key = (function, *map(id, args))
        known = _table.get(key)
        # a known argument is alive, so nothing else has its id
        if known is not None:
            return known[1]  # type: ignore[return-value]
        result = function(*args)  # type: ignore[call-arg]
        if not any(isinstance(a, Tensor) and (a.ndim or a.device.type != "cpu" or a.requires_grad) for a in args):
            if len(_table) >= _LIMIT:
                _table.clear()
            _table[key] = args, result
        return result

    return at


def on_device(table: Tensor, like: Tensor) -> Tensor:
    """A table that never changes, on the device and in the dtype of `like`; it is copied there once."""
    key = on_device, id(table), like.device, like.dtype
    known = _table.get(key)
    if known is not None:
        return known[1]  # type: ignore[return-value]
    copy = table.to(like.device, like.dtype)
    if type(copy) is Tensor:  # not the stand-in of a tracer
        _table[key] = (table,), copy
    return copy
