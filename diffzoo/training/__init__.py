"""Wiring for Lightning: the module, averages, checkpoints, guards and what is seen during training."""

from diffzoo.training.averaging import WeightAverages, averaged
from diffzoo.training.callbacks import SampleGrid
from diffzoo.training.checkpointing import Checkpoints, find_resume
from diffzoo.training.guards import LossGuard
from diffzoo.training.held_out import HeldOutDistance, MemorisationReport
from diffzoo.training.lora import LoRA
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optimizers import FusedAdam, FusedAdamW, TimmOptimizer, parameter_groups
from diffzoo.training.progress import RunProgress
from diffzoo.training.schedules_lr import WarmupConstant, WarmupCosine, WarmupInverseSqrt, WarmupLinear
from diffzoo.training.throughput import CsvLog, Throughput

__all__ = [
    "Checkpoints",
    "CsvLog",
    "DiffusionModule",
    "FusedAdam",
    "FusedAdamW",
    "HeldOutDistance",
    "LoRA",
    "LossGuard",
    "MemorisationReport",
    "RunProgress",
    "SampleGrid",
    "Throughput",
    "TimmOptimizer",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WeightAverages",
    "averaged",
    "find_resume",
    "parameter_groups",
]
