"""Plots of schedules: the numbers are the process's, and recipes, runs and weights can be drawn together."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffzoo import GaussianProcess
from diffzoo.cli.main import main
from diffzoo.plot import Curve, curves
from diffzoo.process import ELBO, Cosine, LinearLogSNR


def test_curves_are_those_of_the_cosine_schedule() -> None:
    drawn = curves(Curve(GaussianProcess(Cosine(-60, 60))), points=8)
    angle = drawn["t"] * torch.pi / 2
    torch.testing.assert_close(drawn["alpha"], torch.cos(angle))
    torch.testing.assert_close(drawn["sigma"], torch.sin(angle))
    assert "weight" not in drawn
    # over log-SNR the bound weighs all noise levels alike, and this schedule spends its time evenly
    flat = curves(Curve(GaussianProcess(LinearLogSNR()), ELBO()), points=8)["weight"]
    torch.testing.assert_close(flat, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_verb_draws_recipes_and_weights_together(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"s.{suffix}"
    assert main(["plot", "schedule", "emoji/simple_uvit_xs_32", "dimr_xl_256", "--out", str(out)]) == 0
    if suffix == "png":
        with Image.open(out) as image:
            assert image.size == (1500, 975)
    else:
        assert "<svg" in out.read_text()


def test_bad_names_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "schedule", "emoji/simple_uvit_xs_3", "--out", "x.png"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["plot", "schedule", "emoji/simple_uvit_xs_32", "--out", "x.pdf"]) == 2
    assert "plots are written as .png or .svg" in capsys.readouterr().err
