"""`diffzoo fit` and `diffzoo validate`: LightningCLI with a run directory, resume and errors that help.

A recipe is one YAML with the keys `seed_everything`, `model` (arguments of `DiffusionModule`), `data` (a data module
by class) and `trainer`. Everything of a run lies in its folder (`diffzoo.runs`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffzoo.errors import UserError
from diffzoo.recipe.files import find_recipe, recipe_name
from diffzoo.recipe.parse import stated_directory
from diffzoo.recipe.train import train
from diffzoo.runs import Run

__all__ = ["report_of_run", "run"]

EPILOG = """
options of the trainer, the model and the data follow as --trainer.KEY, --model.KEY, --data.KEY, for example
  --trainer.max_steps 1000  --model.network_args.dropout 0.2  --data.init_args.batch_size 64
`diffzoo fit -c RECIPE --print_config` prints them all with their values.
"""


def _front(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"diffzoo {verb}",
        description="Train from a recipe." if verb == "fit" else "Validation loss of the weights of a run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    recipe = "recipe: a file or a name that ships; default RUN/config.yaml"
    parser.add_argument("-c", "--config", action="append", default=[], help=recipe)
    parser.add_argument("--run", help="directory of the run; default runs/ and the name of the recipe")
    if verb == "fit":
        parser.add_argument("--resume", help="'auto': continue the newest sound checkpoint, or start; or a path")
        parser.add_argument("--dry-run", action="store_true", help="two steps, preview, evaluation, checkpoint, resume")
    parser.add_argument("--trainer.default_root_dir", dest="root", help=argparse.SUPPRESS)  # the same as --run
    parser.add_argument("--data.folder", dest="folder", help="train on a folder of images; sub-folders are classes")
    return parser


def report_of_run(directory: Path) -> None:
    """Write the report of a run, or say that nothing is logged yet."""
    from diffzoo.report import write_report

    try:
        print(f"report: {write_report([directory], directory / 'report.html')}")
    except UserError as error:
        print(f"no report: {error}")


def run(verb: str, argv: Sequence[str]) -> int:
    """Run `fit` or `validate` with the arguments of the command line."""
    args, rest = _front(verb).parse_known_args(list(argv))
    if args.run and args.root and Path(args.run) != Path(args.root):
        raise UserError(f"--run {args.run} and --trainer.default_root_dir {args.root} are the same thing: give one")
    given = args.run or args.root
    if not args.config and given and Run(Path(given)).config.is_file():
        args.config = [str(Run(Path(given)).config)]
    if not args.config:
        meant = next((word for word in rest[:1] if not word.startswith("-")), "RECIPE")
        raise UserError(f"no recipe: diffzoo {verb} -c {meant}; `diffzoo recipes list` shows those that ship")
    recipes = [find_recipe(name) for name in args.config]
    if getattr(args, "dry_run", False):
        from diffzoo.recipe.dry_run import dry_run

        return dry_run(recipes, rest, args.folder)
    directory = Path(given or stated_directory(recipes) or Path("runs") / recipe_name(recipes[0])).expanduser()
    trainer = train(recipes, rest, directory, verb, getattr(args, "resume", None), args.folder)
    if verb == "fit" and trainer.is_global_zero:
        print(f"trained to step {trainer.global_step}; everything of the run is in {directory}")
        report_of_run(directory)
    return 0
