"""Dataclasses as plain data and back: equal objects, one form of error, classes of other modules."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from process_parts import PATHS, PREDICTIONS, SCHEDULES, WEIGHTINGS

from diffzoo.errors import UserError
from diffzoo.process import Cosine, GaussianProcess, Schedule, Shifted, TimeConditioning, V, Weighting
from diffzoo.record import class_name, from_plain, to_plain
from diffzoo.sampling import DDIM, Guidance, Interval, Karras, PowerCosine, Sampler

PROCESSES = [
    GaussianProcess(schedule, path, prediction, noise_conditioning)
    for schedule in SCHEDULES.values()
    for path in PATHS.values()
    for prediction, noise_conditioning in (
        (PREDICTIONS["v"], TimeConditioning(1000.0, -1.0)),
        (PREDICTIONS["eps"], TimeConditioning()),
    )
]


@dataclass(frozen=True)
class Leaf:
    """A leaf."""

    size: int
    ratio: float = 1.0
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    """Every kind of field."""

    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (0, "")
    by_name: dict[str, Leaf] = field(default_factory=dict)
    schedule: Schedule | None = None
    names: tuple[str, ...] | str = ()
    scale: float | tuple[float, ...] = 1.0
    kind: str = field(default="", metadata={"key": "class"})
    network: type[Sampler] = DDIM


LEAVES = st.builds(Leaf, st.integers(), st.floats(allow_nan=False), st.sampled_from(["a", "b"]))
TREES = st.builds(
    Tree,
    st.lists(LEAVES, max_size=2).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(st.text(), LEAVES, max_size=2),
    st.none() | st.sampled_from(list(SCHEDULES.values())),
    st.text() | st.lists(st.text(), max_size=2).map(tuple),
    st.floats(allow_nan=False) | st.lists(st.floats(allow_nan=False), max_size=2).map(tuple),
    st.text(),
)


@given(TREES, st.booleans())
def test_every_kind_of_field_survives_json(tree: Tree, sparse: bool) -> None:
    assert from_plain(Tree, json.loads(json.dumps(to_plain(tree, sparse=sparse)))) == tree


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_processes_survive_json(process: GaussianProcess) -> None:
    text = json.dumps(to_plain(process))
    assert from_plain(GaussianProcess, json.loads(text)) == process
    assert json.dumps(to_plain(from_plain(GaussianProcess, json.loads(text)))) == text


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=str)
def test_a_part_alone_names_its_class(weighting: Weighting) -> None:
    data = json.loads(json.dumps(to_plain(weighting)))
    assert data["class"] == f"diffzoo.process.{type(weighting).__name__}"
    assert from_plain(Weighting, data) == weighting  # type: ignore[type-abstract]


def test_short_names_defaults_and_the_names_of_earlier_versions() -> None:
    shifted = {"class": "Shifted", "base": "Cosine", "from_resolution": 64, "to_resolution": 256}
    old = {"class": "GaussianProcess", "schedule": shifted, "reads": {"class": "ReadsTime", "scale": 8}}
    assert from_plain(GaussianProcess, old) == GaussianProcess(
        Shifted(Cosine(), 64, 256), noise_conditioning=TimeConditioning(8.0)
    )
    assert from_plain(Sampler, "DDIM") == DDIM()  # type: ignore[type-abstract]
    moved = {"class": "diffzoo.sampling.some_file.DDIM", "grid": "Karras"}
    assert from_plain(Sampler, moved) == DDIM(grid=Karras())  # type: ignore[type-abstract]


def test_guidance_is_written_in_both_formulas_and_its_schedules_need_no_class() -> None:
    words = {"formula": "cond + s * (cond - uncond)", "scale": 1, "interval": {"low": 0.1, "high": 0.4}, "decay": {}}
    assert from_plain(Guidance, words) == Guidance(1.0, "cond", Interval(0.1, 0.4), PowerCosine())
    assert from_plain(Guidance, {"scale": [1, 2]}).scale == (1.0, 2.0)


MODULE = """
from dataclasses import dataclass
from diffzoo.process import Cosine, Schedule

@dataclass(frozen=True)
class Steep(Cosine):
    power: float = 2.0

class Loose(Schedule):
    pass

def run():
    raise SystemExit("a function of the file was called")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of a user's with a schedule."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_parts

    yield my_parts
    sys.modules.pop("my_parts", None)


def test_a_class_of_another_module_is_found_where_that_can_be_imported(module: Any) -> None:
    process = GaussianProcess(module.Steep(power=3.0))
    data = json.loads(json.dumps(to_plain(process)))
    assert data["schedule"]["class"] == class_name(module.Steep) == "my_parts.Steep"
    assert from_plain(GaussianProcess, data) == process


WRONG: list[tuple[Any, str]] = [
    ({"schedule": "Cosin"}, "process.schedule: expected a Schedule, got 'Cosin'; did you mean 'Cosine'"),
    ({"schedule": "Eps"}, "process.schedule: expected a Schedule, got 'Eps'; known: Cosine"),
    ({"schedule": 3}, "process.schedule: expected a Schedule, got 3"),
    ({"schedule": {"min_logsnr": 1}}, "process.schedule: expected a Schedule, got .*name its class"),
    ({"schedule": {"class": "Cosine", "min_logsrn": 1}}, "expected fields of Cosine, got 'min_logsrn'.*'min_logsnr'"),
    ({"schedule": {"class": "Cosine", "min_logsnr": "x"}}, r"schedule.min_logsnr: expected a number, got 'x'"),
    ({"schedule": {"class": "Cosine", "min_logsnr": True}}, r"schedule.min_logsnr: expected a number, got True"),
    ({"schedule": {"class": "Cosine", "min_logsnr": 20}}, "process.schedule: .*min_logsnr < max_logsnr"),
    ({"schedule": {"class": "Interpolated", "at_data": "Cosin"}}, "process.schedule.at_data: expected a Schedule"),
    ({"schedule": {"class": "DiscreteBetas", "kind": "line"}}, "schedule.kind: expected one of 'linear', .*got 'line'"),
    ({"learned_variance": 1}, "process.learned_variance: expected true or false, got 1"),
    ({"schedule": {"class": "no_such_module.X"}}, "lies in the module no_such_module, which cannot be imported"),
    ({"schedule": {"class": "os.path.X"}}, "process.schedule: expected a Schedule, got 'os.path.X'"),
    ({"schedule": {"class": "my_parts.run"}}, "process.schedule: expected a Schedule, got 'my_parts.run'"),
    ({"schedule": {"class": "my_parts.Loose"}}, "process.schedule: expected a Schedule, got 'my_parts.Loose'"),
    ({"schedule": {"class": "../x.Y"}}, "expected a class as module.Class, got '../x.Y'"),
    (3, "process: expected a GaussianProcess, got 3"),
]


@pytest.mark.parametrize(("data", "words"), WRONG, ids=lambda v: str(v)[:60])
def test_a_mistake_is_named_by_its_path(module: Any, data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_plain(GaussianProcess, data, "process")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"leaves": [{"size": 1}, {"size": 1.5}]}, r"tree.leaves.1.size: expected a whole number, got 1.5"),
        ({"leaves": [{}]}, "tree.leaves.0.size: expected a whole number, but it is missing"),
        ({"pair": [1]}, r"tree.pair: expected a list, got \[1\]"),
        ({"by_name": {"a": {"size": 1, "mode": "c"}}}, "tree.by_name.a.mode: expected one of 'a', 'b', got 'c'"),
        ({"names": 3}, "tree.names: expected a list or text, got 3"),
        ({"network": "diffzoo.process.Cosine"}, "tree.network: expected a .*Sampler"),
        ({"by_name": []}, "tree.by_name: expected a mapping"),
    ],
)
def test_containers_name_the_place_inside(data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_plain(Tree, data, "tree")


def test_prediction_by_name() -> None:
    assert from_plain(GaussianProcess, {"prediction": "V"}).prediction == V()
