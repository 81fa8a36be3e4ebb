"""Golden cases: how they are found, loaded and compared. Handlers (`handlers_*.py`) say what to run.

A handler is a pair (predicate, run). `predicate(json) -> bool` looks at the JSON alone (its `model`, `config` and
fields, never a file's name); `run(json, tensors, folder)` computes and compares.
"""

import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Json = dict[str, Any]
Tensors = dict[str, Tensor]
Handler = tuple[Callable[[Json], bool], Callable[[Json, Tensors, Path], None]]

BUNDLED = Path(__file__).parents[1] / "golden"
INDEX = "INDEX.json"


def roots() -> list[Path]:
    """The bundled cases, and the directory that DIFFZOO_GOLDEN names.

    Raises:
        ValueError: if it names no directory, or one without a case: a typing error must not pass for a success.
    """
    extra = os.environ.get("DIFFZOO_GOLDEN")
    if not extra:
        return [BUNDLED]
    folder = Path(extra).expanduser()
    if not folder.is_dir():
        raise ValueError(f"DIFFZOO_GOLDEN names no directory: {extra}")
    if all(p.name == INDEX for p in folder.rglob("*.json")):
        raise ValueError(f"there are no cases (*.json) below the directory that DIFFZOO_GOLDEN names: {extra}")
    return [BUNDLED, folder]


def _listing(path: Path) -> bool:
    return path.parent.name == "state_listings"


def find_cases() -> list[Path]:
    """Every case's JSON file, below every root; documentation and state listings are no cases."""
    found = [p for root in roots() for p in sorted(root.rglob("*.json"))]
    return [p for p in found if not _listing(p) and p.name != INDEX]


def find_listings() -> list[Path]:
    """Every state listing, below every root."""
    return [p for root in roots() for p in sorted(root.rglob("*.json")) if _listing(p)]


def find_handlers(folder: Path = Path(__file__).parent) -> list[Handler]:
    """The handlers of all `handlers_*.py` beside this file."""
    modules = [importlib.import_module(p.stem) for p in sorted(folder.glob("handlers_*.py"))]
    return [handler for module in modules for handler in module.HANDLERS]


def load_case(path: Path) -> tuple[Json, Tensors]:
    """The JSON and its tensors (none for a case that is JSON alone)."""
    tensors = path.with_suffix(".safetensors")
    return json.loads(path.read_text()), load_file(tensors) if tensors.exists() else {}


def section(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors below a prefix such as "state/", without it; floating-point weights as float32."""
    cut = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v.float() if v.is_floating_point() and v.dtype != torch.float64 else v for k, v in cut.items()}


def deviation(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|, in float64; the absolute error where `want` is zero."""
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    got, want = got.detach().double(), want.detach().double()
    if not want.numel():
        return 0.0
    scale = float(want.abs().max())
    return float((got - want).abs().max()) / (scale or 1.0)


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], limit: float) -> None:
    """Compare all of `want`; every name must be in `got`. The message lists the worst."""
    missing = sorted(want.keys() - got.keys())
    assert not missing, f"not computed: {missing}"
    errors = {name: deviation(got[name], tensor) for name, tensor in want.items()}
    bad = sorted(((e, n) for n, e in errors.items() if not e <= limit), reverse=True)
    assert not bad, f"{len(bad)} of {len(want)} tensors off by more than {limit:g}: " + ", ".join(
        f"{n} {e:.3g}" for e, n in bad[:5]
    )
