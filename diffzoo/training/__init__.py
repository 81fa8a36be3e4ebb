"""Wiring for Lightning: the module, averages, checkpoints, guards and what is seen during training."""

from diffzoo.runs import find_resume
from diffzoo.training.averaging import EMA, averaged
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.extra_losses import Alignment, CosineDirection, ExtraLoss, LearnedUncertainty, TimmEncoder
from diffzoo.training.guards import GradientGuard
from diffzoo.training.held_out import HeldOutDistance, MemorisationReport
from diffzoo.training.lora import LoRA
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optimizers import FusedAdam, FusedAdamW, TimmOptimizer, parameter_groups
from diffzoo.training.previews import SampleGrid
from diffzoo.training.progress import RunProgress
from diffzoo.training.schedules_lr import WarmupConstant, WarmupCosine, WarmupInverseSqrt, WarmupLinear
from diffzoo.training.throughput import CsvLog, TrainingLog

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
