"""How a recipe is read: its files, the settings of the command line on top, and what the parser makes of both."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffzoo.cli.recipe_files import find_recipe, newer_explained
from diffzoo.errors import UserError

__all__ = ["command_arguments", "parse_recipe", "plain_warnings", "read_recipe", "split_settings"]


def command_arguments(verb: str, recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> list[str]:
    """What `Command` parses, from what a user gave: see `train`."""
    replaced = _folder_in_place_of_data(recipes, folder) if folder else []
    return [verb, *(f"--config={r}" for r in recipes), *replaced, *rest]


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the recipe in the form of `fit`, with their values, and the other arguments."""
    settings: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if not name.startswith(("--data", "--model", "--trainer", "--seed_everything")) or name == "--data.folder":
            others.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return settings, others


def read_recipe(recipe: str) -> dict[str, Any]:
    """A recipe as it is written."""
    import yaml

    path = find_recipe(recipe)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def parse_recipe(recipes: Sequence[str], settings: Sequence[str], folder: str | None) -> dict[str, Any]:
    """Recipes and settings as `fit` would take them together, defaults included."""
    from diffzoo.cli.lightning_cli import ParsedRecipe

    paths = [find_recipe(name) for name in recipes]
    with plain_warnings(), newer_explained(paths):
        config = ParsedRecipe(command_arguments("fit", paths, settings, folder)).config
    return config["fit"].as_dict()


def _folder_in_place_of_data(recipes: Sequence[Path], folder: str) -> list[str]:
    """Options that read a folder and keep what the recipe says of batches, sizes and treatment of pictures."""
    import yaml

    from diffzoo.data.base import ImageDataModule

    general = set(inspect.signature(ImageDataModule.__init__).parameters) - {"self", "allow_changed_source"}
    kept: dict[str, Any] = {}
    for recipe in recipes:
        data = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("data") or {}
        kept |= {k: v for k, v in (data.get("init_args") or {}).items() if k in general and v is not None}
    options = [f"--data.init_args.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in kept.items()]
    return ["--data=diffzoo.data.ImageFolder", f"--data.init_args.path={folder}", *options]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of this package as plain sentences, without a line of source, and none that nobody can act upon."""
    package, usual = Path(__file__).parents[1], warnings.formatwarning

    def plain(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        ours = Path(filename).is_relative_to(package)
        return f"diffzoo: warning: {message}\n" if ours else usual(message, category, filename, lineno, line)

    with warnings.catch_warnings():
        _quiet()
        warnings.formatwarning = plain
        try:
            yield
        finally:
            warnings.formatwarning = usual


def _quiet() -> None:
    """Hide warnings that a user can do nothing about."""
    for pattern in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*GPU available but not used.*",
        ".*mid-epoch.*",
        ".*overridden `transfer_batch_to_device`.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
