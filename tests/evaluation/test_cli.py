"""`diffzoo eval` and `diffzoo sweep` from the command line, on a tiny network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffzoo.cli.main import main
from diffzoo.evaluation import Result, SamplePlan
from diffzoo.evaluation.sweep import KEEP, Candidate, Trial, candidates, plot, sweep_guidance, table
from diffzoo.generation.guidance import no_guidance
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.process import GaussianProcess
from diffzoo.sampling import Guidance, Interval
from diffzoo.zoo import save_pretrained

METRICS = ["--metrics", "frechet:random-conv", "kid:random-conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = UViTBaoConfig(image_size=16, in_channels=3, num_classes=10, patch=4, width=32, depth=3, heads=2)
    path = tmp_path_factory.mktemp("model")
    save_pretrained(UViTBao(config), path, process=GaussianProcess(), class_names=[f"class {i}" for i in range(10)])
    return path


@pytest.fixture(autouse=True)
def _references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path_factory.getbasetemp() / "references"))


def evaluate(folder: Path, out: Path, *more: str) -> int:
    fixed = ["--protocol", "demo", "--steps", "2", "--block-size", "70", "--quiet", "--device", "cpu"]
    return main(["eval", str(folder), *fixed, "--n", "140", "--out", str(out), *METRICS, *more])


def test_eval_compare_and_evaluate_the_images_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, tmp_path / "a", "--keep-images") == 0
    shown = capsys.readouterr().out
    assert "frechet:random-conv" in shown
    first = Result.load(tmp_path / "a" / "demo_140.json")
    assert first.protocol.reference == "diffzoo-demo-16"
    assert first.plan.weights_sha256
    with np.load(tmp_path / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (140, 16, 16, 3)
        assert archive["arr_1"].tolist() == [i % 10 for i in range(140)]

    images = ["--images", str(tmp_path / "a" / "samples.npz"), "--out", str(tmp_path / "b")]
    assert main(["eval", *images, "--protocol", "demo", "--n", "140", *METRICS, "--quiet", "--device", "cpu"]) == 0
    second = Result.load(tmp_path / "b" / "demo_140.json")
    assert {k: v.value for k, v in second.values.items()} == {k: v.value for k, v in first.values.items()}

    files = [str(tmp_path / name / "demo_140.json") for name in "ab"]
    capsys.readouterr()
    assert main(["eval", "compare", *files]) == 0
    assert "+0 ±" in capsys.readouterr().out

    # the plan of a result makes the same images again
    assert evaluate(folder, tmp_path / "c", "--plan", files[0]) == 0
    assert Result.load(tmp_path / "c" / "demo_140.json").same_numbers() == first.same_numbers()

    evaluate(folder, tmp_path / "a", "--n", "130")
    capsys.readouterr()
    assert main(["eval", "compare", files[0], str(tmp_path / "a" / "demo_130.json")]) == 2
    assert "their protocols differ in n: 140 and 130" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval"], "expected one model"),
        (["eval", "x"], "which protocol?"),
        (["eval", "compare", "one.json"], "compare needs two results, got 1"),
        (["eval", "MODEL", "--protocol", "demos"], "unknown protocol 'demos'"),
        (["eval", "MODEL", "--protocol", "demo", "--n", "20", *METRICS], "at least 129 images, got 20"),
        (["eval", "MODEL", "--protocol", "demo", "--classes", "3", "11"], "do not fit the model: 11"),
        (["eval", "MODEL", "--protocol", "demo", "--sampler", "DDMI"], "did you mean 'DDIM'"),
        (
            ["eval", "MODEL", "--protocol", "demo", "--feature-weights", "random-conv"],
            "expected --feature-weights NETWORK=PATH",
        ),
        (["eval", "MODEL", "--protocol", "adm-imagenet64"], "/imagenet/64/VIRTUAL_imagenet64_labeled.npz"),
        (["eval", "MODEL", "--protocol", "demo", "--plan", "none.json"], "could not read the plan none.json"),
        (["eval", "MODEL", "--protocol", "demo", "--n", "130", "--processes", "0", *METRICS], "at least 1, got 0"),
        (
            ["eval", "MODEL", "--protocol", "demo", "--n", "130", "--block-size", "0", *METRICS],
            "block_size: expected at least 1, got 0",
        ),
        (["eval", "MODEL", "--protocol", "demo", "--device", "cuda:63"], "there is no device cuda:63"),
        (["eval", "MODEL", "--protocol", "demo", "--device", "gpu"], "expected a device such as cpu"),
        (
            ["eval", "MODEL", "--protocol", "demo", "--guidance", "nan", "--n", "130", *METRICS],
            "a finite scale, got nan",
        ),
        (["eval", "MODEL", "--protocol", "demo", "--captions", "PNG"], "could not read the captions"),
        (["eval", "MODEL", "--protocol", "demo", "--weights", "raw", "ema_0.9"], "unrecognized arguments: ema_0.9"),
        (["eval", "--weights", "a=b", "MODEL", "--protocol", "demo"], "are given by --feature-weights a=b"),
        (["sweep", "scales", "MODEL"], "varies guidance, not 'scales'"),
        (["sweep", "guidance", "MODEL"], "which protocol?"),
        (["sweep", "guidance", "MODEL", "--protocol", "demo", "--intervals", "0.5"], "an interval such as 0.2-0.8"),
        (["sweep", "guidance", "MODEL", "--protocol", "demo", "--intervals", "0.9-0.5"], "low before high"),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.png").write_bytes(b"\x89PNG")
    places = {"MODEL": str(folder), "PNG": str(tmp_path / "some.png")}
    args = [places.get(a, a) for a in args]
    more = ["--out", str(tmp_path)] if "compare" not in args else []
    more += ["--device", "cpu"] if more and "--device" not in args else []
    assert main([*args, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_sweep_writes_table_plot_and_plan(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--protocol", "demo", "--n", "140", "--steps", "2", "--scales", "1", "3", "--intervals", "all",
                 "0.2-0.8", "--first-part", "1", "--block-size", "70", "--quiet", "--device", "cpu"]  # fmt: skip
    assert main(["sweep", "guidance", str(folder), *arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "scale 3, t in [0.2, 0.8]" in shown
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "sweep.txt").read_text().splitlines()) == 4  # no guidance has no interval
    plan = SamplePlan.from_dict(json.loads((tmp_path / "plan.json").read_text()))
    assert plan.sampler.steps == 2


# -- the search itself


class Value:
    def __init__(self, value: float):
        self.value = value


def searched(monkeypatch: pytest.MonkeyPatch, values: dict[float, float], **options: object) -> list[Trial]:
    seen = []

    def evaluate(source: SamplePlan, protocol: object, reference: object, options: object) -> object:
        seen.append((source.first_seed, options.few))
        scale = source.guidance.scale if source.guidance else 1.0
        measured = {"frechet:random-conv": Value(values[scale] + 100 / protocol.n)}
        return type("Result", (), {"plan": source, "values": measured})()

    monkeypatch.setattr("diffzoo.evaluation.sweep.evaluate", evaluate)
    from evaluation.stand_ins import protocol

    from diffzoo.evaluation import RunOptions

    p = protocol(1000, metrics=("frechet:random-conv",))
    found = sweep_guidance(
        lambda plan: plan, SamplePlan("x"), p, None, candidates(list(values)), RunOptions(), **options
    )
    assert {s for s, _ in seen} == {0}  # common random numbers
    return found


def test_bad_candidates_are_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = searched(monkeypatch, {1.0: 20.0, 1.5: 10.0, 2.0: 10.5, 3.0: 30.0}, first_part=0.2, margin=0.1)
    assert [t.candidate.scale for t in trials] == [1.5, 2.0, 1.0, 3.0]
    assert [(t.finished, t.n) for t in trials] == [(True, 1000), (True, 1000), (False, 200), (False, 200)]
    text = table(trials)
    assert text.count("(given up)") == 2
    assert text.splitlines()[1].startswith("scale 1.5, everywhere")


def test_without_early_stopping_all_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = searched(monkeypatch, {1.0: 20.0, 1.5: 10.0}, first_part=1.0)
    assert all(t.finished for t in trials)


def test_guidance_of_a_candidate() -> None:
    base = SamplePlan("x", guidance={"scale": 9.0, "formula": "uncond", "interval": {"low": 0.1, "high": 0.2}})
    assert Candidate(1.0).plan(base).guidance is None
    assert Candidate(2.0).plan(base).guidance == Guidance(2.0)
    assert Candidate(2.0, (0.3, 0.6)).plan(base).guidance.interval == Interval(0.3, 0.6)
    kept = Candidate(2.0, KEEP, "0.9").plan(base)
    assert (kept.guidance.interval, kept.weights) == (Interval(0.1, 0.2), "0.9")
    assert len(candidates([1, 2], [None, (0.1, 0.5)], ["a", "b"])) == 6


def test_no_guidance_is_zero_where_the_formula_says_so() -> None:
    base = SamplePlan("x", guidance={"scale": 0.4, "formula": "cond"})
    assert Candidate(0.0).plan(base).guidance is None
    assert Candidate(1.0, (0.3, 0.6)).plan(base).guidance.interval.low == 0.3
    tried = candidates([0, 1], [None, (0.1, 0.5)], none=no_guidance(base.guidance))
    assert tried == [Candidate(0), Candidate(1), Candidate(1, (0.1, 0.5))]


def test_plot_of_one_point(tmp_path: Path) -> None:
    trial = Trial(Candidate(2.0), SamplePlan("x"), 1.0, 10, False, {"fid": 1.0})
    assert plot([trial], "fid", tmp_path / "p.png").stat().st_size > 1000
