"""How many digits a network computes in."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["float32_digits"]


@contextmanager
def float32_digits(full: bool = True) -> Iterator[None]:
    """All digits of float32 in products and convolutions, whatever training chose; TF32 costs three of seven.

    Args:
        full: False leaves the digits as they are.
    """
    if not full:
        yield
        return
    old, new = _read_old_names(), _read_new_names()
    # torch refuses to read settings of which the old and the new names say different things, so both are set
    _write_old_names("highest" if old[0] else None, None if old[1] is None else False)
    for owner, _ in new:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        _write_old_names(*old)
        for owner, held in new:
            owner.fp32_precision = held


def _read_new_names() -> list[tuple[Any, str]]:
    """Owners of the settings of torch 2.9 and later, and what they hold."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    return [(o, o.fp32_precision) for o in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]


def _read_old_names() -> tuple[str | None, bool | None]:
    """Precision of products, and whether convolutions may use TF32; None where the new names contradict."""
    products, convolutions = None, None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return products, convolutions


def _write_old_names(products: str | None, convolutions: bool | None) -> None:
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
