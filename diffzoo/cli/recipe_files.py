"""Where recipes live: in a checkout at its top level, in an installed package inside it."""

from pathlib import Path

from diffzoo.errors import UserError, did_you_mean

__all__ = ["find_recipe", "recipe_name", "recipe_names", "recipes_folder"]


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


def find_recipe(name: str) -> Path:
    """A path as it is, or the file of a recipe that ships.

    Raises:
        UserError: if there is neither, naming the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes_folder() / f"{name.removesuffix('.yaml').removeprefix('recipes/')}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(f"no recipe {name!r}{did_you_mean(name, recipe_names())} `diffzoo recipes list` shows all")


def recipe_name(path: Path) -> str:
    """The name of a recipe's file: "imagenet256-latent/dimr_xl" below a folder `recipes`, else the file's own."""
    parts = path.resolve().with_suffix("").parts
    if "recipes" in parts[:-1]:
        return "/".join(parts[len(parts) - parts[::-1].index("recipes") :])
    return parts[-1]
