"""The README and the documentation are executed: Python runs, commands parse, the zoo's table is the registry's."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from diffzoo.cli.main import LIGHTNING, VERBS
from diffzoo.models.registry import list_models
from diffzoo.models.summary import zoo_table
from diffzoo.recipe.files import find_recipe
from diffzoo.zoo.manifest import list_pretrained

ROOT = Path(__file__).parents[1]
ZOO = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCKS = [
    (comment, language, code)
    for text in PAGES.values()
    for comment, language, code in re.findall(r"(<!--[^\n]*-->\n)?```(\w+)\n(.*?)```", text, re.DOTALL)
]
PYTHON = [(comment, code) for comment, language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for _, language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if "diffzoo " in line
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("comment", "code"), PYTHON, ids=[f"block {n}" for n in range(len(PYTHON))])
def test_python_runs(comment: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, "documentation", "exec")
    if "needs the network" in comment:
        for name in re.findall(r'(?:create_model|pipeline)\("([^"]+)"', code):
            assert name in list_models() or name in list_pretrained()
        return
    if "a file of its own" not in comment:  # `test_extend.py` runs that
        exec(compiled, {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_that_exist(command: str) -> None:
    words = shlex.split(command.split("diffzoo ", 1)[1])
    assert words[0] in VERBS, f"no verb {words[0]!r}"
    options = {w.split("=")[0] for w in words if w.startswith("--")}
    if words[0] in LIGHTNING:
        find_recipe(words[words.index("-c") + 1])
        return
    import argparse

    parser = argparse.ArgumentParser()
    import_module(VERBS[words[0]][0]).configure(parser)
    known = set(parser._option_string_actions)
    for action in parser._actions:
        for sub in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            known |= set(sub._option_string_actions)
    assert options <= known, f"no option {options - known}"


def shown_table() -> str:
    shown = re.search(r"<!-- zoo table.*?-->\n(.*?)\n\n<!-- end of zoo table -->", ZOO, re.DOTALL)
    assert shown is not None
    return shown.group(1).strip()


def test_the_table_names_what_the_registry_has() -> None:
    names = re.findall(r"^\| `(\w+)` \|", shown_table(), re.MULTILINE)
    assert names == list_models(), "regenerate the table: see the comment above it"


@pytest.mark.slow  # half a minute: every network runs on the meta device
def test_the_table_is_that_of_the_registry() -> None:
    assert shown_table() == zoo_table().strip(), "regenerate it: see the comment above the table"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_resolve(page: Path) -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)|src=\"([^\"]+)\"", PAGES[page])
    assert not [a or b for a, b in links if not (page.parent / (a or b)).exists()]
