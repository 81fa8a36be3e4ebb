"""Ours against tensors recorded from the official codes, through the production converters.

The cases lie in `tests/golden` and below the directory that the environment variable DIFFZOO_GOLDEN names.
"""

from pathlib import Path

import pytest
from golden_case import Handler, find_cases, find_handlers, load_case, roots

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def handlers() -> list[Handler]:
    return find_handlers()


@pytest.mark.parametrize("path", find_cases(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path: Path, handlers: list[Handler]) -> None:
    case, tensors = load_case(path)
    runs = [run for predicate, run in handlers if predicate(case)]
    assert runs, f"no handler for the model {case.get('model')!r} of {path}: its fields are {sorted(case)}"
    for run in runs:
        run(case, tensors, path.parent)


def test_every_tensor_file_has_its_description() -> None:
    lonely = [p for root in roots() for p in root.rglob("*.safetensors") if not p.with_suffix(".json").exists()]
    assert not lonely


def test_cases_below_the_named_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    for name in ("x.json", "INDEX.json"):
        (deep / name).write_text("{}")
    bundled = len(find_cases())
    monkeypatch.setenv("DIFFZOO_GOLDEN", str(tmp_path))
    found = find_cases()
    assert (deep / "x.json") in found
    assert (deep / "INDEX.json") not in found
    assert len(found) >= min(bundled, 1) + 1


def test_a_case_that_nobody_knows_fails(tmp_path: Path, handlers: list[Handler]) -> None:
    (tmp_path / "x.json").write_text('{"model": "made up", "config": {}}')
    with pytest.raises(AssertionError, match="no handler for the model 'made up'"):
        test_case(tmp_path / "x.json", handlers)
