"""Ways to sample side by side: each column is what its way gives alone, under a head that tells it apart."""

from pathlib import Path

import numpy as np
import pytest

from diffzoo import pipeline
from diffzoo.cli.main import main
from diffzoo.generation.compare import Way, compare, every_way

NAME = "simple_uvit_xs_32.emoji"


def test_a_column_is_what_its_way_gives_alone() -> None:
    ways = every_way([NAME], samplers=["DDIM", "DPMSolver"], steps=[2, 4])
    sheet = compare(ways, ["Flags"], [3, 5], "cpu")
    assert sheet.heads == [f"{s}, steps {n}" for s in ("DDIM", "DPMSolver") for n in (2, 4)]
    assert sheet.titles == ["Flags, seed 3"] * 4 + ["Flags, seed 5"] * 4
    alone = pipeline(NAME, "cpu")(["Flags"], [3, 5], sampler="DPMSolver", steps=2)
    assert np.array_equal(sheet.pixels[2::4], alone.pixels)
    assert [r["sampler"]["steps"] for r in sheet.records[:4]] == [2, 4, 2, 4]
    assert compare([Way(NAME, steps=1)], None, [0], "cpu").heads == [""]


def test_the_command_writes_one_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["compare", NAME, "--seeds", "0-1", "--device", "cpu", "--quiet", "--out", str(tmp_path / "sheet.png")]
    assert main([*fixed, "--guidance", "1", "3", "--steps", "2"]) == 0
    assert "4 images, columns: guidance 1.0; guidance 3.0" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()
    assert main([*fixed, "--steps", *map(str, range(1, 26))]) == 2
    assert "25 combinations are more than a sheet shows, 24" in capsys.readouterr().err
