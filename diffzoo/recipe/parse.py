"""How a recipe is read: its files, then the settings of the command line, parsed together."""

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffzoo.errors import UserError
from diffzoo.recipe.files import find_recipe, newer_explained, recipes_folder
from diffzoo.recipe.imports import postpone_imports

__all__ = [
    "command_arguments",
    "parse_overrides",
    "parse_recipe",
    "plain_warnings",
    "read_recipe",
    "section",
    "split_settings",
    "stated_directory",
]


HIDDEN = (  # warnings that users cannot act on
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*GPU available but not used.*",
    ".*mid-epoch.*",
    ".*overridden `transfer_batch_to_device`.*",
    ".*recommended to use `self.log\\('train/loss'.*",
)


def command_arguments(verb: str, recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> list[str]:
    """What `Command` parses, from what a user gave: see `train`."""
    _find_own_modules(recipes)
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


def read_recipe(recipe: str) -> dict[str, object]:
    """A recipe as it is written.

    Raises:
        UserError: it is no mapping in YAML.
    """
    import yaml

    path = find_recipe(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no recipe: expected keys such as model, data and trainer")
    return content


def section(content: object, *keys: str) -> Mapping[str, Any]:
    """The mapping below some keys of a recipe; empty where it states none."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def parse_overrides(words: list[str]) -> dict[str, object]:
    """`key=value` words as a dict; values are read as YAML."""
    import yaml

    overrides: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"expected key=value, got {word!r}")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            expected = "a number, a word or {pixels: value}"
            raise UserError(f"cannot read the value of {word!r}: expected {expected}") from None
    return overrides


def parse_recipe(recipes: Sequence[str], settings: Sequence[str], folder: str | None) -> dict[str, object]:
    """Recipes and settings as `fit` would take them together, defaults included."""
    postpone_imports()
    from diffzoo.recipe.command import ParsedRecipe

    paths = [find_recipe(name) for name in recipes]
    with plain_warnings(), newer_explained(paths):
        config = ParsedRecipe(command_arguments("fit", paths, settings, folder)).config
    return config["fit"].as_dict()


def stated_directory(recipes: Sequence[Path]) -> str | None:
    """`trainer.default_root_dir` of the last recipe that has one; `config.yaml` of a run does."""
    stated = [section(read_recipe(str(r)), "trainer").get("default_root_dir") for r in recipes]
    return next((s for s in reversed(stated) if s), None)


def _find_own_modules(recipes: Sequence[Path]) -> None:
    """Let classes of files beside a recipe be named in it."""
    for folder in (str(r.parent.resolve()) for r in recipes):
        if folder not in sys.path and not Path(folder).is_relative_to(recipes_folder()):
            sys.path.append(folder)


def _folder_in_place_of_data(recipes: Sequence[Path], folder: str) -> list[str]:
    """Options that read a folder: its number of classes, and what the recipe says of batches, sizes and hold-out."""
    from diffzoo.data import ImageDataModule, ImageFolder

    signature = {n for c in (ImageFolder, ImageDataModule) for n in inspect.signature(c).parameters}
    signature -= {"path", "val_path", "allow_changed_source"}
    kept: dict[str, object] = {}
    classes = None
    for recipe in recipes:
        content = read_recipe(str(recipe))
        given = section(content, "data", "init_args")
        kept |= {k: v for k, v in given.items() if k in signature and v is not None}
        classes = section(content, "model", "network_args").get("num_classes", classes)
    found = ImageFolder(folder).num_classes
    if not found:  # stated, because the recipe's own value stays otherwise
        kept["balance"] = False
    options = [f"--data.init_args.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in kept.items()]
    if classes is not None:
        options.append(f"--model.network_args.num_classes={found}")
    return ["--data=diffzoo.data.ImageFolder", f"--data.init_args.path={folder}", *options]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings of this package as sentences without a line of source; hide those that users cannot act on."""
    package, usual = Path(__file__).parents[1], warnings.formatwarning

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = Path(filename).is_relative_to(package)
        return f"diffzoo: warning: {message}\n" if ours else usual(message, category, filename, lineno, line)

    with warnings.catch_warnings():
        for pattern in HIDDEN:
            warnings.filterwarnings("ignore", message=pattern)
        warnings.formatwarning = plain
        try:
            yield
        finally:
            warnings.formatwarning = usual
