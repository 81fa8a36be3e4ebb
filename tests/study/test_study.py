"""Studies: paired comparison against SciPy, budgets, files that ship, and a real study that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from diffzoo.cache import lock
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.runs import Launch, launch
from diffzoo.study.report import compare_arms, judge
from diffzoo.study.runner import Children, Job, Measured, _child, measured, run_jobs, set_aside
from diffzoo.study.spec import Budget, Claim, Evaluate, read_study

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"))
FIRST = {0: 1.0, 1: 1.3, 2: 0.9}
SECOND = {0: 1.5, 1: 1.6, 2: 1.5, 7: 9.0}

TOY = """
title: Toy
source: none
base: emoji/simple_uvit_xs_32
settings: {trainer.callbacks: null, model.lr_scheduler: null, trainer.limit_val_batches: 1}
arms:
  cosine: {}
  shifted: {model.process.schedule: {class_path: Shifted, init_args: {from_resolution: 64, to_resolution: 32}}}
seeds: [0]
budget: {steps: 3}
claims: [{says: shifting helps, measure: held-out loss, lower: shifted, than: cosine}]
"""


def test_the_paired_interval_is_that_of_scipy() -> None:
    found = compare_arms(FIRST, SECOND)
    assert found is not None
    paired = stats.ttest_rel([FIRST[s] for s in range(3)], [SECOND[s] for s in range(3)]).confidence_interval(0.95)
    assert found.seeds == 3
    assert found.mean - found.half_width == pytest.approx(paired.low)
    assert found.mean + found.half_width == pytest.approx(paired.high)


@pytest.mark.parametrize(
    ("lower", "than", "word"),
    [("a", "b", "holds"), ("b", "a", "does not hold"), ("a", "c", "undecided at this budget")],
)
def test_verdicts(lower: str, than: str, word: str) -> None:
    columns = {"a": FIRST, "b": {s: v + 1 + 0.01 * s for s, v in FIRST.items()}, "c": {0: 1.1, 1: 1.1, 2: 1.1}}
    results = {arm: {s: Measured({"loss": v}) for s, v in column.items()} for arm, column in columns.items()}
    assert judge(Claim("it", "loss", lower, than), results).word == word
    with pytest.raises(UserError, match="no measure is called 'los'; there are loss"):
        judge(Claim("it", "los", lower, than), results)


def test_equal_flops_are_equal_flops() -> None:
    budget = Budget(images=9_600, equal_flops=True)
    assert [budget.steps_of(24, flops, 2.0) * flops for flops in (2.0, 1.0, 4.0)] == [800, 800, 800]
    assert Budget(images=9_600).steps_of(24, 1.0, 2.0) == 400


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_studies_that_ship_run_dry(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffzoo.cli.study._check_ready", lambda *_: None)  # photographs and large images do not ship
    study = read_study(path)
    assert main(["study", f"studies/{path.stem}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in study.arms)
    assert len(study.seeds) >= 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("budget: {steps: 3}", "budget: {step: 3}"), "budget"),
        (("budget: {steps: 3}", "budget: {steps: 3, images: 5}"), "either steps or images"),
        (("than: cosine", "than: cosin"), "did you mean 'cosine'"),
        (("seeds: [0]", "seeds: [0, 0]"), "different seeds"),
        (("  cosine: {}", "  cosine: {model.condition_dropuot: 0.2}"), "condition_dropout"),
        (("model.process.schedule: {class_path: Shifted, init_args: {from_resolution: 64, to_resolution: 32}}",
          "model.condition_dropout: 0.1"), "differ in nothing"),
    ],
)  # fmt: skip
def test_bad_studies_are_one_sentence(
    tmp_path: Path, change: tuple[str, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert change[0] in TOY
    (tmp_path / "toy.yaml").write_text(TOY.replace(*change))
    assert main(["study", str(tmp_path / "toy.yaml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("evaluate: {protocol: demo, options: {reference: no.npz}}", "evaluate: the reference no.npz does not exist"),
        ("evaluate: {protocol: demo, n: 14}", "evaluate: frechet:random-conv needs at least 129 images, got 14"),
        ("evaluate: {protocol: demo, options: {step: 9}}", "evaluate: unrecognized arguments: --step 9; did you mean"),
        ("", "no/such/folder"),
    ],
)
def test_what_a_study_lacks_is_said_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, sentence: str, dry: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("diffzoo.study.runner.run_jobs", lambda *_: pytest.fail("it trains"))
    missing = "" if more else "data: {class_path: ImageFolder, init_args: {path: no/such/folder}}, "
    (tmp_path / "toy.yaml").write_text(TOY.replace("settings: {", f"settings: {{{missing}") + more)
    assert main(["study", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "out"), *dry]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_study_that_is_finished_needs_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("runner", "report"):
        monkeypatch.setattr(f"diffzoo.study.{module}.measured", lambda job: Measured({"held-out loss": 1.0}))
    (tmp_path / "toy.yaml").write_text(TOY + "evaluate: {protocol: demo, options: {reference: no.npz}}")
    monkeypatch.setattr("diffzoo.study.runner.run_jobs", lambda *_: None)
    assert main(["study", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "out")]) == 0


def _study(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "diffzoo", "study", str(folder / "toy.yaml"), "--out", str(folder / "out"), *more]
    return subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("change", "run", "evaluation"),
    [
        ({}, True, True),
        ({"arguments": ("-c", "/new/recipes/emoji/base.yaml", "--a=1")}, True, True),
        ({"arguments": ("-c", "/old/recipes/emoji/base.yaml", "--a=2")}, False, False),
        ({"arguments": ("-c", "/old/recipes/cifar10/base.yaml", "--a=1")}, False, False),
        ({"steps": 4}, False, False),
        ({"evaluate": Evaluate("demo", 64)}, True, False),
    ],
)
def test_what_stays_where_settings_change(
    tmp_path: Path, change: dict[str, object], run: bool, evaluation: bool
) -> None:
    """A shipped recipe in another checkout is no change."""
    job = Job("arm", 0, tmp_path, ("-c", "/old/recipes/emoji/base.yaml", "--a=1"), 3, Evaluate("demo", 32))
    set_aside(job)
    for name in ("run", "eval"):
        (tmp_path / name).mkdir()
    done = {"settings": job.settings, "values": {"loss": 1.0}, "speed": {}}
    (tmp_path / "done.json").write_text(json.dumps(done))
    changed = replace(job, **change)
    assert (measured(changed) is not None) == evaluation
    set_aside(changed)
    assert (tmp_path / "run").is_dir() == run
    assert (tmp_path / "eval").is_dir() == (tmp_path / "done.json").is_file() == evaluation


def test_an_interrupted_study_begins_no_further_run(tmp_path: Path) -> None:
    begun, ended = [], threading.Event()

    def say(line: str) -> None:
        begun.append(line)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        ended.wait(60)
        raise UserError("ended with its parent")

    jobs = [Job("arm", seed, tmp_path / str(seed), ("-c", "base"), 3, None) for seed in range(3)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs, 1, say)
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
    time.sleep(1)
    assert len(begun) == 1


def test_invocations_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds a run held takes those after it, and the held one when its holder is gone."""
    ended = list[int]()
    monkeypatch.setattr("diffzoo.study.runner._child", lambda arguments, job, *more: ended.append(job.seed) or "")
    monkeypatch.setattr("diffzoo.study.runner._values", lambda job: ({}, {}))
    jobs = [Job("arm", seed, tmp_path / str(seed), ("-c", "base"), 3, None) for seed in range(3)]
    ours = threading.Thread(target=run_jobs, args=(jobs, 1, lambda line: None))
    with lock(jobs[0].folder / "held"):
        ours.start()
        limit = time.monotonic() + 60
        while len(ended) < 2 and time.monotonic() < limit:
            time.sleep(0.05)
        assert ended == [1, 2]
        assert ours.is_alive()
    ours.join(60)
    assert ended == [1, 2, 0]


def test_nothing_starts_after_the_end(tmp_path: Path) -> None:
    """A run that waited for another invocation when its study was interrupted must not begin then."""
    children = Children()
    children.end()
    command = [sys.executable, "-c", "print(1)"]
    with (
        open(tmp_path / "log.txt", "w") as log,
        pytest.raises(CancelledError),
        children.start(command, log, {}),
    ):
        pass
    assert not (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_study_goes_on_and_gives_the_same_results(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy.yaml").write_text(TOY)
    assert _study(tmp_path / "whole", "--processes", "2").wait() == 0
    killed = _study(tmp_path / "killed")
    first = tmp_path / "killed" / "out" / "cosine" / "seed-0" / "done.json"
    while not first.exists():
        assert killed.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    stamp = first.stat().st_mtime_ns
    assert _study(tmp_path / "killed").wait() == 0
    assert first.stat().st_mtime_ns == stamp, "a finished run was repeated"
    results = [(tmp_path / name / "out" / "study.json").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]
    assert set(json.loads(results[0])["arms"]) == {"cosine", "shifted"}


@pytest.mark.slow
def test_an_arm_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    text = TOY.replace("  cosine: {}", "  cosine: {}\n  broken: {model.weights: nowhere.safetensors}")
    (tmp_path / "toy.yaml").write_text(text)
    assert _study(tmp_path).wait() == 1
    report = (tmp_path / "out" / "study.md").read_text()
    assert "- broken, seed 0: `diffzoo fit` ended with status 2" in report
    assert "| shifted | 3 | 1 of 1 |" in report


def test_runs_are_jobs_of_their_own_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that kept the rank of its parent would wait for the others, and write no result."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "STAYS"):
        monkeypatch.setenv(name, "3")
    assert _child([], Job("a", 0, tmp_path, (), 1, None), 1, Children()) == ""
    seen = dict(line.split("=", 1) for line in (tmp_path / "log.txt").read_text().splitlines() if "=" in line)
    assert seen["STAYS"] == "3"
    assert launch(seen) == Launch()
