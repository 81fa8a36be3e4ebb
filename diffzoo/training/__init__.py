"""Training with Lightning: the module, its EMA, checkpoints, guards, logs and previews.

Importing this package is light; each name is loaded when it is asked for. Planning needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffzoo.runs import find_resume
    from diffzoo.training.checkpointing import Checkpointing
    from diffzoo.training.ema import EMA, averaged
    from diffzoo.training.extra_losses import Alignment, CosineDirection, ExtraLoss, LearnedUncertainty, TimmEncoder
    from diffzoo.training.guards import GradientGuard
    from diffzoo.training.held_out import HeldOutDistance, MemorisationReport
    from diffzoo.training.lora import LoRA
    from diffzoo.training.module import DiffusionModule
    from diffzoo.training.optimizers import FusedAdam, FusedAdamW, TimmOptimizer, parameter_groups
    from diffzoo.training.previews import SampleGrid
    from diffzoo.training.progress import RunProgress
    from diffzoo.training.schedules_lr import WarmupConstant, WarmupCosine, WarmupInverseSqrt, WarmupLinear
    from diffzoo.training.training_log import CsvLog, TrainingLog

_HOMES = {
    "runs": "find_resume",
    "training.checkpointing": "Checkpointing",
    "training.ema": "EMA averaged",
    "training.extra_losses": "Alignment CosineDirection ExtraLoss LearnedUncertainty TimmEncoder",
    "training.guards": "GradientGuard",
    "training.held_out": "HeldOutDistance MemorisationReport",
    "training.lora": "LoRA",
    "training.module": "DiffusionModule",
    "training.optimizers": "FusedAdam FusedAdamW TimmOptimizer parameter_groups",
    "training.previews": "SampleGrid",
    "training.progress": "RunProgress",
    "training.schedules_lr": "WarmupConstant WarmupCosine WarmupInverseSqrt WarmupLinear",
    "training.training_log": "CsvLog TrainingLog",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "EMA",
    "Alignment",
    "Checkpointing",
    "CosineDirection",
    "CsvLog",
    "DiffusionModule",
    "ExtraLoss",
    "FusedAdam",
    "FusedAdamW",
    "GradientGuard",
    "HeldOutDistance",
    "LearnedUncertainty",
    "LoRA",
    "MemorisationReport",
    "RunProgress",
    "SampleGrid",
    "TimmEncoder",
    "TimmOptimizer",
    "TrainingLog",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "averaged",
    "find_resume",
    "parameter_groups",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'diffzoo.training' has no attribute {name!r}")
    return getattr(import_module(f"diffzoo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
