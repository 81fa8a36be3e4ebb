"""Where recipes are: at the top level of a checkout, or inside the installed package; and which version wrote one.

A line `# diffzoo 0.2.0` among the comments at the top says which version wrote a recipe, so that one of a later version
can be told from one with a mistake. `config.yaml` of a run and copies of shipped recipes have it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffzoo.errors import UserError, did_you_mean

__all__ = [
    "command_of",
    "find_recipe",
    "kind_of",
    "newer_explained",
    "recipe_name",
    "recipe_names",
    "recipes_folder",
    "stated_version",
    "version_line",
]

Kind = Literal["run", "study"]


def recipes_folder() -> Path:
    """The folder of the recipes that ship."""
    package = Path(__file__).parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError("the recipes are missing from this installation: install diffzoo again")


def recipe_names() -> list[str]:
    """Names such as "cifar10/simple_uvit", sorted."""
    folder = recipes_folder()
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def find_recipe(name: str, kind: Kind | None = "run") -> Path:
    """A path as it is, or the file of a recipe that ships.

    Args:
        name: of the file or the recipe.
        kind: what it must not be the other of; None = either.

    Raises:
        UserError: if there is neither, naming the nearest recipe, or for a recipe of the other kind.
    """
    path = Path(name)
    if not path.is_file():
        path = recipes_folder() / f"{name.removesuffix('.yaml').removeprefix('recipes/')}.yaml"
    if not path.is_file():
        near = did_you_mean(name, recipe_names()) or ";"
        raise UserError(f"no recipe {name!r}{near} `diffzoo recipes list` shows all")
    found = kind_of(path)
    if kind and found and found != kind:
        raise UserError(f"{name} is the recipe of a {found}, not of a {kind}: {command_of(path, name)}")
    return path


def kind_of(path: Path) -> Kind | None:
    """Whether a file is the recipe of a run or of a study; None if it could be part of either."""
    keys = set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    return "study" if "arms" in keys else "run" if keys & {"model", "data", "trainer", "seed_everything"} else None


def command_of(path: Path, name: str) -> str:
    """The command that the recipe in a file is for, by the name that the user knows."""
    return f"diffzoo study {name}" if kind_of(path) == "study" else f"diffzoo fit -c {name}"


def recipe_name(path: Path) -> str:
    """The name of a recipe's file: "imagenet256-latent/dimr_xl" below a folder `recipes`, else the file's own."""
    parts = path.resolve().with_suffix("").parts
    if "recipes" in parts[:-1]:
        return "/".join(parts[len(parts) - parts[::-1].index("recipes") :])
    return parts[-1]


def version_line() -> str:
    """The line that says which version wrote a recipe."""
    from diffzoo import __version__

    return f"# diffzoo {__version__}\n"


def stated_version(path: Path) -> str | None:
    """The version in the comments at the top of a recipe, if they say one."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    found = re.search(r"^# (?:Version: *)?diffzoo[ =]+(\d+(?:\.\d+)*)", "\n".join(head), re.MULTILINE)
    return found.group(1) if found else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


@contextmanager
def newer_explained(recipes: Sequence[Path]) -> Iterator[None]:
    """Warn of recipes that a newer version wrote; if something is wrong inside the block, the error says so too."""
    from lightning.pytorch.utilities import rank_zero_warn

    newer = [sentence for sentence in map(_if_newer, recipes) if sentence]
    for sentence in newer:
        rank_zero_warn(sentence)
    try:
        yield
    except UserError as error:
        if newer:
            raise UserError(f"{error}; {newer[0]}") from error
        raise


def _if_newer(path: Path) -> str | None:
    from diffzoo import __version__

    stated = stated_version(path)
    if not stated or _numbers(stated) <= _numbers(__version__):
        return None
    return f"{path} was written for diffzoo {stated} and this is {__version__}: pip install --upgrade diffzoo"
