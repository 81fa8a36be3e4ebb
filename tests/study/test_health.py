"""Reference curves: the interval by simulation, runs that are made up, and the verb."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.study import health
from diffzoo.study.health import check_run, curve_of, prediction_interval, read_curve, write_curve

LEVELS = {"min_-10": 0.1, "-2_0": 0.5, "2_5": 0.8, "10_max": 1.0}
RECIPE = {
    "model": {"network": "simple_uvit_xs_32", "optimizer": {"lr": 0.1}, "seed": 0},
    "data": {"class_path": "Demo"},
}


def made_up(folder: Path, seed: int, factors: dict[str, float] | None = None, rows: int = 200, lr: float = 0.1) -> Path:
    """A run whose loss of a level falls with the images, with 2 % of noise; `factors` raise it after 50 rows."""
    folder.mkdir(parents=True)
    recipe = {**RECIPE, "model": {**RECIPE["model"], "seed": seed, "optimizer": {"lr": lr}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    draw = np.random.default_rng(seed)
    names = [f"train/loss_logsnr_{level}" for level in LEVELS]
    lines = [",".join(["step", *names, "speed/images_seen"])]
    for row in range(1, rows + 1):
        values = [
            base * (1 + row) ** -0.3 * (1 + 0.02 * draw.normal()) * ((factors or {}).get(level, 1) if row > 50 else 1)
            for level, base in LEVELS.items()
        ]
        lines.append(",".join(map(str, [25 * row, *values, 600 * row])))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [made_up(tmp_path / f"seed-{seed}", seed) for seed in range(4)]


def test_the_interval_holds_one_more_value_in_95_of_100() -> None:
    draws = np.random.default_rng(0).normal(3, 2, (3000, 4))
    hits = 0
    for *known, another in draws.tolist():
        low, high = prediction_interval(known)
        hits += low <= another <= high
    assert hits / 3000 == pytest.approx(0.95, abs=0.015)


def test_a_run_of_the_same_recipe_is_in_the_band(runs: list[Path], tmp_path: Path) -> None:
    curve = curve_of("toy", runs)
    assert curve.edges[-1] == 600 * 200
    found = check_run(made_up(tmp_path / "new", 9), curve)
    assert (found.images, found.out, found.differences) == (120_000, [], ())
    assert str(found) == "4 of 4 noise levels in the band of toy (4 runs) at 120,000 images"


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"min_-10": 1.5}, "high noise above"),
        ({"-2_0": 1.5}, "middle above"),
        ({"10_max": 1.5}, "low noise above"),
        (dict.fromkeys(LEVELS, 1.5), "all above"),
        ({"2_5": 0.6}, "below"),
        ({"2_5": math.nan}, "low noise above"),
    ],
)
def test_what_is_out_is_named(runs: list[Path], tmp_path: Path, factors: dict[str, float], said: str) -> None:
    found = check_run(made_up(tmp_path / "new", 9, factors), curve_of("toy", runs))
    assert {level.name for level in found.out} == set(factors)
    # the factor acts from row 51 on, which is in the window that begins at 42.4 rows
    assert {level.since for level in found.out} <= {round(600 * 200 / 2**1.5), round(600 * 200 / 2**2), (600 * 100)}
    assert health.MEANINGS[said] in str(found)


def test_a_run_that_goes_on_is_judged_as_far_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    run = made_up(tmp_path / "new", 9, rows=90)
    with open(run / "metrics.csv", "a") as file:
        file.write("2275,0.1,0.")  # a row that is being written
    assert check_run(run, curve_of("toy", runs)).images == round(600 * 200 / 2**1.5)
    with pytest.raises(UserError, match="has seen 4,800 images: the first window of toy ends at"):
        check_run(made_up(tmp_path / "young", 9, rows=8), curve_of("toy", runs))


def test_the_verb(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_curve(curve_of("toy", runs), tmp_path / "toy.json")
    assert read_curve(tmp_path / "toy.json") == curve_of("toy", runs)
    against = ["--against", str(tmp_path / "toy.json")]
    assert main(["study", "check", str(runs[0]), *against]) == 0
    bad = made_up(tmp_path / "bad", 9, {"2_5": 2.0}, lr=0.3)
    assert main(["study", "check", str(bad), *against]) == 1
    out = capsys.readouterr().out
    assert "the recipe differs in model.optimizer.lr\nlog-SNR 2 to 5: above the band since" in out
    recipe = yaml.safe_load((bad / "config.yaml").read_text())
    recipe["model"]["weighting"] = {"class_path": "Sigmoid"}
    (bad / "config.yaml").write_text(yaml.safe_dump(recipe))
    for command, sentence in [
        (["study", "check", str(bad), *against], "it differs in model.weighting.class_path"),
        (["study", "check", str(bad)], "no shipped reference curve matches its settings"),
        (["study", "check", str(bad), "--against", "toyy"], "no reference curve is called 'toyy'"),
        (["study", "check", str(tmp_path)], "is not the directory of a run"),
        (["study", "check"], "say which run"),
    ]:
        assert main(command) == 2
        assert sentence in capsys.readouterr().err


def test_curves_that_ship() -> None:
    """The runs of a study, whose losses fall; windows of the other noise levels are as long."""
    shipped = health.curves()
    assert shipped
    for curve in shipped.values():
        assert curve.runs >= health.FEWEST
        for band in curve.bands.values():
            assert len(band.low) == len(band.high) == len(curve.edges) - 1
            assert all(0 < low < high for low, high in zip(band.low, band.high, strict=True))
        assert curve.bands["-2_0"].high[-1] < curve.bands["-2_0"].low[0]


def test_curves_come_from_enough_runs_of_one_recipe(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 3 runs"):
        curve_of("toy", runs[:2])
    with pytest.raises(UserError, match=r"differs from .* in model\.optimizer\.lr"):
        curve_of("toy", [*runs, made_up(tmp_path / "other", 9, lr=0.3)])
