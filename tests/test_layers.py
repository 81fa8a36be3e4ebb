"""Imports point down: the table of CONTRIBUTING.md as a dict, and a proof that the check can fail."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffzoo"

BASE = {
    "typing",
    "errors",
    "lazy",
    "sizes",
    "environment",
    "record",
    "rng",
    "philox",
    "files",
    "formats",
    "unpickle",
    "images",
    "cache",
    "hub",
    "pins",
    "tensors",
    "runs",
    "precision",
    "progress",
}
# layer: the layers of diffzoo it may import, besides itself and BASE
MAY_IMPORT: dict[str, set[str]] = {
    "typing": set(),
    "errors": set(),
    "lazy": set(),
    "sizes": set(),
    "environment": set(),
    "record": set(),
    "philox": set(),
    "rng": set(),
    "files": set(),
    "formats": set(),
    "unpickle": set(),
    "images": set(),
    "precision": set(),
    "hub": set(),
    "cache": set(),
    "pins": set(),
    "tensors": set(),
    "runs": set(),
    "progress": set(),
    "process": set(),
    "nn": set(),
    "models": {"nn"},
    "sampling": {"process"},
    "encoders": set(),
    "data": set(),
    "metrics": set(),
    "zoo": {"models", "nn", "process", "sampling", "encoders"},
    "factory": {"models", "zoo", "process", "sampling", "encoders"},
    "generation": {"zoo", "models", "process", "sampling", "encoders"},
    "training": {"process", "sampling", "models", "encoders", "metrics", "zoo", "factory", "generation", "evaluation"},
    "evaluation": {"generation", "metrics", "data", "sampling", "encoders", "process", "models", "zoo"},
    "demo": {"generation", "zoo", "sampling", "process"},
    "interop": {"process", "sampling"},
    "plot": {"process"},
    "portable": {"interop", "generation", "models", "process", "encoders", "zoo"},
    "report": set(),
    "study": {"record", "report"},
    "recipe": {"data", "encoders", "evaluation", "models", "process", "sampling", "study", "training", "zoo"},
    "cli": {"*"},
    "__init__": {"*"},
    "__main__": {"*"},
}
HEAVY = {"lightning", "datasets", "transformers", "diffusers", "huggingface_hub", "timm", "torchmetrics", "matplotlib"}
# layer: third-party packages it must not import anywhere, not even inside a function
NEVER: dict[str, set[str]] = {
    "typing": HEAVY,
    "errors": HEAVY | {"torch"},
    "lazy": HEAVY | {"torch"},
    "sizes": HEAVY | {"torch"},
    "record": HEAVY | {"torch"},
    "process": HEAVY | {"numpy"},
    "nn": HEAVY,
    "models": HEAVY,
    "sampling": HEAVY,
    "encoders": {"lightning", "datasets"},
    "metrics": {"lightning", "datasets"},
    "zoo": {"lightning", "datasets"},
    "factory": {"lightning", "datasets"},
    "generation": {"lightning", "datasets"},
    "evaluation": {"lightning"},
    "demo": HEAVY,
    "plot": HEAVY - {"matplotlib"},
    "report": HEAVY - {"matplotlib"},
    "study": HEAVY - {"matplotlib"},
}


def imports(source: str) -> list[str]:
    """Every module imported anywhere in the source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name"
            found.append(node.module or "")
            if node.module == "diffzoo":
                found += [f"diffzoo.{alias.name}" for alias in node.names]
    return found


def violations(layer: str, source: str) -> list[str]:
    """Imports that the table forbids to a file of this layer."""
    allowed = MAY_IMPORT[layer] | BASE | {layer}
    wrong = []
    for module in imports(source):
        top, _, rest = module.partition(".")
        if top == "diffzoo" and rest:
            target = rest.split(".")[0]
            if "*" not in allowed and target in MAY_IMPORT and target not in allowed:
                wrong.append(module)
        elif top in NEVER.get(layer, set()):
            wrong.append(module)
    return wrong


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert violations(layer_of(path), path.read_text()) == []


def test_nobody_imports_the_command_line() -> None:
    for path in FILES:
        if layer_of(path) not in ("cli", "__main__"):
            assert not [m for m in imports(path.read_text()) if m.startswith("diffzoo.cli")], path


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("process", "from diffzoo.nn.attention import Attention"),
        ("models", "def f():\n    from diffzoo.sampling import sample"),
        ("nn", "import lightning.pytorch as L"),
        ("sampling", "from diffzoo import models"),
        ("typing", "import transformers"),
    ],
)
def test_the_check_can_fail(layer: str, source: str) -> None:
    assert violations(layer, source)
