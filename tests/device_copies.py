"""Counts what moves between host and device, with the meta device in the place of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Moved(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func in COPIES and len({t.device.type for t in (*tensors, out)}) > 1:
            self.found.append(str(func))
        return out


class _Made(TorchFunctionMode):
    """`torch.tensor(1.0, device=...)` copies before the dispatcher sees it."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device.type != "cpu":
            self.found.append(f"torch.{func.__name__}")
        return out


@contextmanager
def counted_copies() -> Iterator[list[str]]:
    """The operations inside that bring a tensor from one type of device to another, by name."""
    found: list[str] = []
    with _Moved(found), _Made(found):
        yield found
