"""How a recipe is trained: the folder of its run, the checkpoint that it resumes from, and advice on memory."""

import json
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.environment import environment
from diffzoo.errors import UserError
from diffzoo.recipe.files import newer_explained
from diffzoo.recipe.imports import postpone_imports
from diffzoo.recipe.parse import command_arguments, plain_warnings, section
from diffzoo.runs import Run, RunLock, checksum_file, find_resume, is_first_process, is_sound, step_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["train"]

LIGHTNING = re.compile(
    r"lightning[/\\](pytorch|fabric)[/\\](trainer|loops|utilities|core|callbacks|strategies|accelerators)"
)


def train(
    recipes: Sequence[Path],
    rest: Sequence[str],
    directory: Path,
    verb: str = "fit",
    resume: str | None = None,
    folder: str | None = None,
) -> "Trainer":
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
    postpone_imports()
    from diffzoo.recipe.command import Command

    arguments = [*command_arguments(verb, recipes, rest, folder), f"--trainer.default_root_dir={directory}"]
    lock = RunLock(directory) if verb == "fit" else nullcontext()
    with plain_warnings(), lock, newer_explained(recipes), memory_explained(arguments), settings_explained():
        if verb == "fit":
            say_hardware(recipes)
            arguments += _start(directory, resume, rest, arguments)
            _note_start(directory, arguments[-1])
        else:
            arguments += _measured(directory, rest)
        trainer = Command(arguments).trainer
    if verb == "fit" and is_first_process():
        from diffzoo.study.health import note

        if text := note(directory):  # beside earlier runs of the recipe, where a reference curve ships
            print(text, flush=True)
    return trainer


def _start(directory: Path, resume: str | None, rest: Sequence[str], arguments: list[str]) -> list[str]:
    """The checkpoint that a run resumes from, as an option; only the command line can name one, a recipe cannot."""
    from diffzoo.recipe.command import ParsedRecipe

    if any(a.split("=")[0] == "--ckpt_path" for a in rest):
        raise UserError("--ckpt_path: say --resume PATH, which checks the checkpoint first")
    if resume:
        checkpoint = find_resume(directory) if resume == "auto" else _checkpoint(Path(resume))
        if checkpoint is None:
            return ["--ckpt_path=null"]
        if is_first_process():
            print(f"resuming from {checkpoint}", flush=True)
        return [f"--ckpt_path={checkpoint}"]
    if is_first_process() and any(Run(directory).checkpoints.glob("*")):
        ParsedRecipe(arguments)  # a wrong key is reported before anything else
        raise UserError(
            f"{directory} already holds a run: continue it with --resume auto, or choose another --run directory"
        )
    return ["--ckpt_path=null"]


def _note_start(directory: Path, option: str) -> None:
    """Record the step at which the run starts or resumes, and its environment, for the report."""
    if not is_first_process():
        return
    step = max(0, step_of(Path(option.partition("=")[2])))
    line = json.dumps({"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **environment()})
    with Run(directory).starts.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _measured(directory: Path, rest: Sequence[str]) -> list[str]:
    """The weights to validate, as an option: those of the run, unless the command line names others."""
    if any(a.split("=")[0] in ("--ckpt_path", "--model.weights") for a in rest):
        return []
    checkpoint = find_resume(directory)
    if checkpoint is None:
        raise UserError(
            f"{directory} is no run with checkpoints: say whose weights to validate, --run RUN, --ckpt_path FILE or "
            "--model.weights NAME"
        )
    return [f"--ckpt_path={checkpoint}"]


@contextmanager
def settings_explained() -> Iterator[None]:
    """Turn what Lightning refuses inside the block into a sentence; errors from elsewhere pass."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        raise UserError(_one_sentence(error)) from error
    except (ValueError, TypeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames or not LIGHTNING.search(frames[-1].filename):
            raise
        setting = re.search(r"% self\.trainer\.(\w+)", frames[-1].line or "")
        if isinstance(error, ZeroDivisionError) and setting:
            raise UserError(f"trainer.{setting[1]}: expected a positive whole number, got 0") from error
        raise UserError(_one_sentence(error)) from error


def _one_sentence(error: BaseException) -> str:
    return "trainer: " + " ".join(str(error).replace("`", "").split())


def say_hardware(recipes: Sequence[Path]) -> None:
    """Say so if a recipe is meant for accelerators that this machine does not have."""
    import torch

    if not is_first_process() or torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    for recipe in recipes:
        stated = re.search(r"^# Hardware: *(.*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        if stated and "CPU" not in stated.group(1):
            print(
                f"{recipe} is meant for {stated.group(1)} and this machine has no GPU: expect it to take very long; "
                "`diffzoo plan` says what it needs",
                flush=True,
            )


def _checkpoint(path: Path) -> Path:
    """The checkpoint at a path, checked before anything is built: can a run resume from it?"""
    import pickle

    import torch

    if not path.exists():
        raise UserError(f"no checkpoint at {path}: give a file, or --resume auto")
    if Run(path).exists:
        raise UserError(f"{path} is the directory of a run: continue it with --run {path} --resume auto")
    instead = f"a new run starts from weights with --model.weights {path} in place of --resume"
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights and nothing that a run could go on from: {instead}")
    sound = is_sound(path)
    if not sound and checksum_file(path).is_file():
        raise UserError(f"the checkpoint {path} is damaged (its checksum does not match): give another, or auto")
    if (path / "meta.pt").is_file():  # in shards
        return path
    if not sound:
        raise UserError(f"{path} is no checkpoint of a run, or a damaged one: give one of its checkpoints; {instead}")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # it holds objects of a callback
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
        arguments: of `diffzoo.recipe.command.Command`, whose recipe was running.
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
    """Which setting to change, by the plan of the parsed recipe."""
    from diffzoo.recipe.command import ParsedRecipe, world_size
    from diffzoo.recipe.plan import advice, plan_content
    from diffzoo.training.gpus import this_gpu

    config = ParsedRecipe(list(arguments)).config
    content = config[arguments[0]].as_dict()
    devices = world_size(content["trainer"])
    try:
        gpu = this_gpu()
        plans = [plan_content(content, "the recipe", devices, recompute=again)[0] for again in (False, True)]
    except UserError as error:  # a network that is no registered name
        return f"the device ran out of memory: take a smaller data.init_args.micro_batch_size (no plan: {error})"
    micro = section(content, "data", "init_args").get("micro_batch_size")
    share = max(1, plans[0].batch // devices)
    return advice(plans[0], plans[1], gpu, min(int(micro or share), share))
