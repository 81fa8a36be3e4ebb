"""Ours against tensors recorded from the official codes, through the production converters.

The cases lie in `tests/golden` and below the directory that the environment variable DIFFZOO_GOLDEN names.
"""

import json
from pathlib import Path

import pytest
import torch
from golden_case import BUNDLED, Handler, find_cases, find_handlers, load_case, roots
from safetensors.torch import save_file

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


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "x.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIFFZOO_GOLDEN", "~/cases")
    assert tmp_path / "cases" / "x.json" in find_cases()


def test_a_directory_without_cases_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_GOLDEN", str(tmp_path / "mistyped"))
    with pytest.raises(ValueError, match=r"DIFFZOO_GOLDEN names no directory: .*mistyped"):
        find_cases()
    (tmp_path / "INDEX.json").write_text("{}")
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setenv("DIFFZOO_GOLDEN", str(tmp_path))
    with pytest.raises(ValueError, match="there are no cases"):
        find_cases()


@pytest.mark.parametrize("says", ["table (ROWS,COLUMNS) read at the corner", "a table"], ids=["stated", "not stated"])
@pytest.mark.parametrize("grid", [(5, 8), (9, 7), (4, 6)])
def test_units_with_another_position_table(
    grid: tuple[int, int], says: str, tmp_path: Path, handlers: list[Handler]
) -> None:
    case, tensors = load_case(BUNDLED / "dimr_units.json")
    x = tensors["in/x4"]
    table = torch.randn(*grid, x.shape[-1])
    case["semantics"]["position_embeddings"] = says.replace("ROWS", str(grid[0])).replace("COLUMNS", str(grid[1]))
    tensors["state/position_embeddings.position_embeddings.weight"] = table.flatten(0, 1)
    tensors["out/position_embeddings"] = x + table[: x.shape[1], : x.shape[2]]
    (tmp_path / "x.json").write_text(json.dumps(case))
    save_file(tensors, tmp_path / "x.safetensors")
    test_case(tmp_path / "x.json", handlers)
    tensors["out/position_embeddings"] = x + table[: x.shape[1], : x.shape[2]].flip(0)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AssertionError, match="position_embeddings"):
        test_case(tmp_path / "x.json", handlers)


def test_a_case_that_nobody_knows_fails(tmp_path: Path, handlers: list[Handler]) -> None:
    (tmp_path / "x.json").write_text('{"model": "made up", "config": {}}')
    with pytest.raises(AssertionError, match="no handler for the model 'made up'"):
        test_case(tmp_path / "x.json", handlers)
