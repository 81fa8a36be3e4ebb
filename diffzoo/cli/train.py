"""How a recipe is trained: the folder of its run, what it goes on from, and what is said when memory runs out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffzoo.cli.recipe import command_arguments, plain_warnings
from diffzoo.cli.recipe_files import newer_explained
from diffzoo.errors import UserError
from diffzoo.runs import Run, RunLock, checksum_file, find_resume, is_first_process, is_sound

__all__ = ["memory_explained", "train"]


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
    from diffzoo.cli.lightning_cli import Command

    arguments = command_arguments(verb, recipes, rest, folder)
    if not any(a.startswith("--trainer.default_root_dir") for a in rest):
        arguments.append(f"--trainer.default_root_dir={directory}")
    with plain_warnings(), RunLock(directory):
        if resume:
            checkpoint = find_resume(directory) if resume == "auto" else _checkpoint(Path(resume))
            if checkpoint is not None:
                if is_first_process():
                    print(f"resuming from {checkpoint}")
                arguments.append(f"--ckpt_path={checkpoint}")
        elif verb == "fit" and is_first_process() and any(Run(directory).checkpoints.glob("*")):
            raise UserError(
                f"{directory} already holds a run: continue it with --resume auto, or choose another --run directory"
            )
        with newer_explained(recipes), memory_explained(arguments):
            return Command(arguments).trainer


def _checkpoint(path: Path) -> Path:
    """A checkpoint given by its path, if a run can go on from it: said before anything is built."""
    import pickle

    import torch

    if not path.exists():
        raise UserError(f"no checkpoint at {path}: give a file, or --resume auto")
    if Run(path).exists:
        raise UserError(f"{path} is the directory of a run: continue it with --run {path} --resume auto")
    instead = f"a new run starts from weights with --model.weights {path} in place of --resume"
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights and nothing that a run could go on from: {instead}")
    if checksum_file(path).is_file() and not is_sound(path):
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


@contextmanager
def memory_explained(arguments: Sequence[str]) -> Iterator[None]:
    """Turn "out of memory" inside the block into a sentence that says which setting fits.

    Args:
        arguments: of `diffzoo.cli.lightning_cli.Command`, whose recipe was running.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_sentence(arguments)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the host
            raise
        raise UserError("the memory of this machine ran out: take a smaller data.init_args.micro_batch_size") from error


def _sentence(arguments: Sequence[str]) -> str:
    """What to change, from the recipe as it was parsed."""
    from diffzoo.cli.lightning_cli import ParsedRecipe, world_size
    from diffzoo.training.gpus import this_gpu
    from diffzoo.training.recipe_plan import advice, plan_content

    config = ParsedRecipe(list(arguments)).config
    content = config[arguments[0]].as_dict()
    trainer = content["trainer"]
    devices = world_size(trainer)
    sharded = "ModelParallelStrategy" in str(trainer.get("strategy"))
    try:
        gpu = this_gpu()
        plans = [
            plan_content(content, "the recipe", devices, devices if sharded else 1, recompute=again)[0]
            for again in (False, True)
        ]
    except UserError as error:  # a network that is no registered name
        return f"the device ran out of memory: take a smaller data.init_args.micro_batch_size (no plan: {error})"
    micro = (content["data"].get("init_args") or {}).get("micro_batch_size")
    share = max(1, plans[0].batch // devices)
    return advice(plans[0], plans[1], gpu, min(int(micro or share), share))
