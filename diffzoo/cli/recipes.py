"""`diffzoo recipes list | show NAME | copy NAME [TO]`."""

import argparse
from pathlib import Path

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.recipe.files import command_of, find_recipe, recipe_names, stated_version, version_line


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `diffzoo recipes`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | show | copy")
    actions.add_parser("list", help="names and first lines of all recipes")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="copy a recipe, to change it")
    copy.add_argument("name")
    copy.add_argument("to", nargs="?", help="file; default: the recipe's name in this folder")


def run(args: argparse.Namespace) -> int:
    """List, print or copy recipes."""
    if args.action == "list":
        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            title = find_recipe(name, None).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            print(f"{name:<{width}}  {title}")
    elif args.action == "show":
        print(find_recipe(args.name, None).read_text(encoding="utf-8"), end="")
    else:
        source = find_recipe(args.name, None)
        to = Path(args.to or source.name)
        if to.is_dir():
            to = to / source.name
        if to.exists():
            raise UserError(f"{to} exists already: name another file")
        version = "" if stated_version(source) else version_line()
        write_text(to, version + source.read_text(encoding="utf-8"))
        print(f"copied to {to}; run it with: {command_of(to, str(to))}")
    return 0
