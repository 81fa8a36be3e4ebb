"""Wiring for Lightning: the module, its EMA, checkpoints, guards and what is seen during training.

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

_HOME = {
    "Alignment": "training.extra_losses",
    "CosineDirection": "training.extra_losses",
    "ExtraLoss": "training.extra_losses",
    "LearnedUncertainty": "training.extra_losses",
    "TimmEncoder": "training.extra_losses",
    "CsvLog": "training.training_log",
    "Checkpointing": "training.checkpointing",
    "DiffusionModule": "training.module",
    "EMA": "training.ema",
    "FusedAdam": "training.optimizers",
    "FusedAdamW": "training.optimizers",
    "GradientGuard": "training.guards",
    "HeldOutDistance": "training.held_out",
    "LoRA": "training.lora",
    "MemorisationReport": "training.held_out",
    "RunProgress": "training.progress",
    "SampleGrid": "training.previews",
    "TimmOptimizer": "training.optimizers",
    "TrainingLog": "training.training_log",
    "WarmupConstant": "training.schedules_lr",
    "WarmupCosine": "training.schedules_lr",
    "WarmupInverseSqrt": "training.schedules_lr",
    "WarmupLinear": "training.schedules_lr",
    "averaged": "training.ema",
    "find_resume": "runs",
    "parameter_groups": "training.optimizers",
}

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
