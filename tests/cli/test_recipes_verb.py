"""`diffzoo recipes`: what is listed can be shown and copied, and nothing is overwritten."""

from pathlib import Path

import pytest
import yaml

from diffzoo import __version__
from diffzoo.cli.main import main
from diffzoo.recipe.files import find_recipe, recipe_name, recipe_names, stated_version


def test_list_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    assert len(recipe_names()) > 10
    assert all(name in shown for name in recipe_names())


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    name = recipe_names()[0]
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == find_recipe(name).read_text()


def test_copy_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, to = recipe_names()[0], tmp_path / "mine.yaml"
    assert main(["recipes", "copy", name, str(to)]) == 0
    assert yaml.safe_load(to.read_text())["model"]
    line, rest = to.read_text().split("\n", 1)
    assert line == f"# diffzoo {__version__}"
    assert rest == find_recipe(name).read_text()
    assert stated_version(to) == __version__
    assert main(["recipes", "copy", str(to), str(tmp_path / "again.yaml")]) == 0
    assert (tmp_path / "again.yaml").read_bytes() == to.read_bytes()  # what wrote it first
    to.write_text("mine")
    assert main(["recipes", "copy", name, str(to)]) == 2
    assert to.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_every_recipe_has_a_run_directory_of_its_own() -> None:
    """Many share the last part of their names."""
    assert [recipe_name(find_recipe(name, None)) for name in recipe_names()] == recipe_names()
    assert recipe_name(Path("elsewhere/mine.yaml")) == "mine"
    assert recipe_name(Path("recipes/cifar10/mine.v2.yaml")) == "cifar10/mine.v2"
