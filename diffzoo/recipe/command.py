"""LightningCLI with this project's defaults; the only file that knows its inner workings."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jsonargparse._typehints as typehints
import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

# short class names in recipes work for classes that are imported here
import diffzoo.data
import diffzoo.encoders
import diffzoo.process
import diffzoo.sampling
import diffzoo.training
from diffzoo.errors import UserError, causes
from diffzoo.files import write_text
from diffzoo.recipe.explain import explain, null_argument
from diffzoo.recipe.files import recipe_name, version_line
from diffzoo.record import RENAMED
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.guards import GradientGuard
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.progress import RunProgress
from diffzoo.training.training_log import CsvLog, TrainingLog

__all__ = ["BuiltRecipe", "Command", "ParsedRecipe", "build_data", "world_size"]

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's own, for jsonargparse 5

T = TypeVar("T")

for _package in (diffzoo.data, diffzoo.training):  # their classes are imported on first use
    for _name in _package.__all__:
        getattr(_package, _name)


def _start_from_its_own_defaults(parser_or_action: object, previous: Namespace | None, value: Namespace) -> None:
    """A newly chosen class takes no arguments from the class it replaces.

    jsonargparse keeps arguments of the same name: `weighting: Sigmoid` would silently inherit `measure` from the
    default weighting, and `schedule: LinearBeta` a bound from the cosine. A recipe means what it says.
    """
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        previous["init_args"] = Namespace()


def _by_old_or_new_name(cls: type | tuple[type], name: str) -> str:
    """The class of a name; one from an earlier version is the class that took its place."""
    module, _, last = name.rpartition(".")
    ours = not module or module.startswith("diffzoo.")
    return _by_name(cls, RENAMED.get(last, name) if ours else name)


_by_name = typehints.resolve_class_path_by_name
typehints.resolve_class_path_by_name = _by_old_or_new_name
typehints.discard_init_args_on_class_path_change = _start_from_its_own_defaults


class Command(LightningCLI):
    """`fit` and `validate` over `DiffusionModule` and any data module."""

    def __init__(self, arguments: list[str]):
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        super().__init__(
            DiffusionModule,
            L.LightningDataModule,
            args=arguments,
            subclass_mode_data=True,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
            trainer_defaults={"gradient_clip_val": 1.0, "max_epochs": -1, "enable_model_summary": False},
            seed_everything_default=0,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"model", "dataloaders", "datamodule"}
        return {"fit": hidden | {"train_dataloaders", "val_dataloaders"}, "validate": hidden}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        shown = io.StringIO()
        try:
            with contextlib.redirect_stderr(shown):
                # Lightning's own version warns of a sys.argv besides
                self.config = parser.parse_args(cast(list[str], args))
        except SystemExit as stop:
            if stop.code in (0, None):  # --print_config, --help
                raise
            raise UserError(explain(shown.getvalue() or str(stop), self._keys())) from stop
        except Exception as error:
            raise UserError(explain(str(error), self._keys())) from error

    def _keys(self) -> list[str]:
        actions = (action for parser in self._subcommand_parsers.values() for action in parser._actions)
        return sorted({action.dest for action in actions} - {"help"})

    def _parse_ckpt_path(self) -> None:
        """Recipe and command line win over what a checkpoint stores."""

    def instantiate_classes(self) -> None:
        """Build everything."""
        with _explained(self.config[self.subcommand].as_dict()):
            super().instantiate_classes()
        recipes = self._get(self.config_init, "config") or []
        self.model.recipe = " + ".join(recipe_name(Path(str(path))) for path in recipes) or None

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        directory, loggers = Path(config.get("default_root_dir") or "."), config.get("logger")
        if loggers in (None, True):
            loggers = TensorBoard(directory, name="", version="tensorboard")
        if loggers is not False:  # the recipe's loggers, and metrics.csv always
            config["logger"] = [CsvLog(directory), *_as_list(loggers)]
        callbacks = _as_list(config.get("callbacks"))
        config["callbacks"] = _with_defaults(callbacks, config.get("enable_checkpointing") is False)
        micro_batches = getattr(self.datamodule, "micro_batches", None)
        if micro_batches is not None:
            count = micro_batches(world_size(config))  # a batch that does not divide is refused before processes start
            if getattr(self.datamodule, "micro_batch_size", None) is not None:
                config["accumulate_grad_batches"] = count
        return super().instantiate_trainer(**kwargs)


def _as_list(value: T | Sequence[T] | None) -> list[T]:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


def _with_defaults(chosen: list[L.Callback], unsaved: bool) -> list[L.Callback]:
    """The recipe's callbacks and those of every run; none that saves, where nothing is to be saved."""
    if unsaved:
        chosen = [c for c in chosen if not isinstance(c, Checkpoint)]
    defaults = (GradientGuard, TrainingLog, RunProgress, *(() if unsaved else (Checkpointing,)))
    return chosen + [default() for default in defaults if not any(isinstance(c, default) for c in chosen)]


class BuiltRecipe(Command):
    """A recipe whose parts are built and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class ParsedRecipe(BuiltRecipe):
    """A recipe read and checked, with nothing built: `config` holds every value, defaults included."""

    def _set_seed(self) -> None:
        """Leave the random numbers of the process alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def build_data(data: Mapping[str, Any]) -> L.LightningDataModule:
    """The data module of a parsed recipe's section `data`, without the rest.

    Raises:
        UserError: what the module raises where it is built.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    with _explained({"data": data}):
        return cast(L.LightningDataModule, parser.instantiate_classes(parser.parse_object({"data": data})).data)


@contextlib.contextmanager
def _explained(sections: Mapping[str, object]) -> Iterator[None]:
    """Raise our own errors, and missing packages, without the parser's wrapping; say if a null is behind another."""
    try:
        yield
    except Exception as error:
        cause = next((e for e in causes(error) if isinstance(e, UserError | ImportError)), None)
        if cause is error:
            raise
        if cause is not None:
            raise (cause if isinstance(cause, UserError) else UserError(str(cause))) from None
        if said := null_argument(sections):
            raise UserError(said) from error
        raise


def world_size(config: Mapping[str, Any] | Namespace) -> int:
    """How many devices the settings of a trainer ask for, over all nodes."""
    devices = config.get("devices", "auto")
    if isinstance(devices, (list, tuple)):
        count = len(devices)
    elif devices in ("auto", -1, "-1", None):
        count = max(1, torch.cuda.device_count()) if config.get("accelerator", "auto") != "cpu" else 1
    else:
        count = int(devices)
    return max(1, count) * int(config.get("num_nodes", 1) or 1)  # the trainer itself refuses zero devices


class TensorBoard(TensorBoardLogger):
    """Lightning's logger; where the disk is full, the run goes on without it."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        write_or_warn(Path(self.log_dir), lambda: super(TensorBoard, self).log_metrics(metrics, step))

    def save(self) -> None:
        write_or_warn(Path(self.log_dir), super().save)

    def finalize(self, status: str) -> None:
        write_or_warn(Path(self.log_dir), lambda: super(TensorBoard, self).finalize(status))


class SaveRecipe(SaveConfigCallback):
    """Saves the whole configuration as `config.yaml` of the run directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self.already_saved:
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        kept = self.config.clone()
        kept["ckpt_path"] = None  # the checkpoint it resumed from is no part of the recipe
        text = version_line() + self.parser.dump(kept, skip_none=False)
        write_or_warn(path, lambda: write_text(path, text))
        self.already_saved = True
