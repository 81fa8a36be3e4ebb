"""The front of the command line: verbs, help and messages without tracebacks."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from diffzoo.cli.main import LIGHTNING, VERBS, main
from diffzoo.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there_and_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_module(VERBS[verb][0]).run
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"diffzoo {verb}" in capsys.readouterr().out


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "unknown verb 'smaple'; did you mean 'sample'"),
        (["train"], "unknown verb 'train'; did you mean 'fit'"),
        (["--config", "x.yaml", "fit"], "the verb comes first: diffzoo fit"),
        (["describe", "simple_uvit_265"], "did you mean 'simple_uvit_256'"),
        (["recipes", "show", "cifar10/simple_uvitt"], "did you mean 'cifar10/simple_uvit'"),
        (["fit", "cifar10/simple_uvit"], "no recipe: diffzoo fit -c cifar10/simple_uvit;"),
        (["fit", "-c", "studies/dimr"], "the recipe of a study, not of a run: diffzoo study studies/dimr"),
        (["plan", "-c", "studies/dimr"], "the recipe of a study, not of a run: diffzoo study studies/dimr"),
        (["study", "cifar10/simple_uvit"], "not of a study: diffzoo fit -c cifar10/simple_uvit"),
        (["list", "emoji"], "no model matches 'emoji'; did you mean '*emoji*'?"),
        (["recipe", "list"], "unknown verb 'recipe'; did you mean 'recipes'"),
        (["recipes", "copy", "cifar10/simple_uvit", f"{__file__}/x.yaml"], "cannot be read or written: "),
        (["plan", str(ROOT / "benchmarks/results/emoji.png")], "is not valid YAML"),
        (
            ["describe", "simple_uvit_xs_32", "num_classes=null"],
            "to keep 0 (number of real classes; 0 = unconditional)",
        ),
        (["describe", "simple_uvit_xs_32", "num_classes=2.0"], "num_classes: expected a whole number, got 2.0"),
        (["describe", "simple_uvit_xs_32", "dropout=x"], "dropout: expected a number or null, got 'x'"),
        (["describe", "simple_uvit_xs_32", "depth_at=3"], "depth_at: expected a mapping or null, got 3"),
        (
            ["sample", "--size", "400000", "--steps", "1", "--seeds", "0", "--quiet"],
            "the memory of this machine does not hold that",
        ),
        (["sample", "--steps", "9999999"], "a sampler needs at most 1,000,000 steps, got 9999999"),
        (["sample", "--device", "mps:99"], "expected a device such as cpu, cuda or cuda:1, got 'mps:99'"),
    ],
)
def test_mistakes_are_one_sentence_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_text_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("hello")
    assert main(["plan", str(tmp_path / "r.yaml")]) == 2
    assert "r.yaml is no recipe: expected keys such as model" in capsys.readouterr().err


def test_tracebacks_are_one_variable_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["describe", "nothing_like_it"])


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m diffzoo list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_only_lightning_verbs_get_raw_arguments() -> None:
    assert set(LIGHTNING) <= set(VERBS)
