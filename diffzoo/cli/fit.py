"""`diffzoo fit` and `diffzoo validate`: LightningCLI with a run directory, resume and errors that help.

A recipe is one YAML with the keys `seed_everything`, `model` (arguments of `DiffusionModule`), `data` (a data module
by class) and `trainer`. Everything of a run lies in its directory:

    config.yaml  metrics.csv  tensorboard/  samples/  checkpoints/  averages/
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffzoo.cli.recipe_files import find_recipe, recipe_name
from diffzoo.errors import UserError

__all__ = ["command_arguments", "plain_warnings", "run", "train"]

EPILOG = """
options of the trainer, the model and the data follow as --trainer.KEY, --model.KEY, --data.KEY, for example
  --trainer.max_steps 1000  --model.network_args.dropout 0.2  --data.init_args.batch_size 64
`diffzoo fit -c RECIPE --print_config` prints them all with their values.
"""


def _front(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"diffzoo {verb}",
        description="Train from a recipe." if verb == "fit" else "Validation loss of a checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="recipe: a file, or a name that ships")
    parser.add_argument("--run", help="directory of the run; default runs/ and the name of the recipe")
    if verb == "fit":
        parser.add_argument("--resume", help="'auto': continue the newest sound checkpoint, or start; or a path")
        parser.add_argument(
            "--dry-run", action="store_true", help="two real steps, preview, evaluation, checkpoint, resume"
        )
    parser.add_argument("--data.folder", dest="folder", help="train on a folder of images; sub-folders are classes")
    return parser


def run(verb: str, argv: Sequence[str]) -> int:
    """Run `fit` or `validate` with the arguments of the command line."""
    args, rest = _front(verb).parse_known_args(list(argv))
    recipes = [find_recipe(name) for name in args.config]
    if getattr(args, "dry_run", False):
        from diffzoo.cli.dry_run import dry_run

        return dry_run(recipes, rest, args.folder)
    directory = Path(args.run) if args.run else Path("runs") / recipe_name(recipes[0])
    trainer = train(recipes, rest, directory, verb, getattr(args, "resume", None), args.folder)
    if verb == "fit" and trainer.is_global_zero:
        print(f"trained to step {trainer.global_step}; everything of the run is in {directory}")
    return 0


def train(
    recipes: Sequence[Path],
    rest: Sequence[str],
    directory: Path,
    verb: str = "fit",
    resume: str | None = None,
    folder: str | None = None,
) -> Any:
    """Parse the recipe, set up the run directory and train; returns the trainer.

    Args:
        recipes: YAML files; later ones win.
        rest: options in LightningCLI's form.
        directory: where everything of the run goes.
        verb: "fit" or "validate".
        resume: None = start, "auto" = newest sound checkpoint if there is one, or a path.
        folder: replaces the recipe's data by a folder of images.

    Raises:
        UserError: for anything in the recipe or the options that does not fit, naming the nearest right key.
    """
    from lightning.pytorch.utilities import rank_zero_warn

    from diffzoo.cli.lightning_cli import Command
    from diffzoo.cli.out_of_memory import memory_explained
    from diffzoo.cli.recipe_version import newer_explained
    from diffzoo.training.checkpointing import RunLock, _is_first_process, find_resume

    arguments = command_arguments(verb, recipes, rest, folder)
    if not any(a.startswith("--trainer.default_root_dir") for a in rest):
        arguments.append(f"--trainer.default_root_dir={directory}")
    with plain_warnings(), RunLock(directory):
        if resume:
            checkpoint = find_resume(directory, rank_zero_warn) if resume == "auto" else _checkpoint(Path(resume))
            if checkpoint is not None:
                if _is_first_process():
                    print(f"resuming from {checkpoint}")
                arguments.append(f"--ckpt_path={checkpoint}")
        elif verb == "fit" and _is_first_process() and list((directory / "checkpoints").glob("*")):
            raise UserError(
                f"{directory} already holds a run: continue it with --resume auto, or choose another --run directory"
            )
        with newer_explained(recipes), memory_explained(arguments):
            return Command(arguments).trainer


def command_arguments(verb: str, recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> list[str]:
    """What `Command` parses, from what a user gave: see `train`."""
    replaced = _folder_in_place_of_data(recipes, folder) if folder else []
    return [verb, *(f"--config={r}" for r in recipes), *replaced, *rest]


def _checkpoint(path: Path) -> Path:
    """A checkpoint given by its path, if a run can go on from it: said before anything is built."""
    import pickle

    import torch

    from diffzoo.training.checkpointing import _checksum_file, is_sound

    if not path.exists():
        raise UserError(f"no checkpoint at {path}: give a file, or --resume auto")
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} is the directory of a run: continue it with --run {path} --resume auto")
    instead = f"a new run starts from weights with --model.weights {path} in place of --resume"
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights and nothing that a run could go on from: {instead}")
    if _checksum_file(path).is_file() and not is_sound(path):
        raise UserError(f"the checkpoint {path} is damaged (its checksum does not match): give another, or auto")
    if (path / "meta.pt").is_file():  # in shards
        return path
    if not is_sound(path):
        raise UserError(f"{path} is no checkpoint of a run, or a damaged one: give one of its checkpoints; {instead}")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # a callback's own objects are in it
        return path
    except RuntimeError:  # an archive of something else
        held = None
    missing = [k for k in ("state_dict", "optimizer_states", "loops") if not isinstance(held, dict) or k not in held]
    if missing:
        raise UserError(f"{path} holds no state of a run ({', '.join(missing)}) to go on from: {instead}")
    return path


def _folder_in_place_of_data(recipes: Sequence[Path], folder: str) -> list[str]:
    """Options that read a folder and keep what the recipe says of batches, sizes and treatment of pictures."""
    import inspect

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


if __name__ == "__main__":
    sys.exit(run("fit", sys.argv[1:]))
