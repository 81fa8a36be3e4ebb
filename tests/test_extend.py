"""The page on parts of one's own is run as it is written: trained, resumed, sampled, evaluated, pushed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1])}
    arguments = [sys.executable, "-m", "diffzoo", *shlex.split(command)[1:]]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow  # seven commands in processes of their own
@pytest.mark.timeout(1200)
def test_parts_of_ones_own_go_all_the_way(tmp_path: Path) -> None:
    (parts, recipe), commands = _blocks()
    (tmp_path / "my_parts.py").write_text(parts)
    (tmp_path / "my_recipe.yaml").write_text(recipe)
    for command in [*commands, "diffzoo fit --run runs/mine --resume auto --trainer.max_steps 22"]:
        done = run(tmp_path, command)
        assert done.returncode == 0, done.stderr
    assert "whoever loads it needs my_parts" in run(tmp_path, commands[-1]).stdout
    broken = parts.replace("def _derivative", "def _slope")
    (tmp_path / "my_parts.py").write_text(broken)
    assert "my_parts.Line lacks the methods _derivative" in run(tmp_path, commands[0] + "-2").stderr


def _blocks() -> tuple[tuple[str, str], list[str]]:
    found = re.findall(r"```(python|yaml|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (_, parts), (_, recipe), (_, commands) = found[:3]
    return (parts, recipe), commands.strip().splitlines()
