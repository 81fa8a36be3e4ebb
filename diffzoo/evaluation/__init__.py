"""Evaluation whose numbers can be trusted and repeated: plans, protocols, resumable runs, records."""

from diffzoo.evaluation.presets import PRESETS, preset
from diffzoo.evaluation.records import EvalProtocol, ImagesPlan, NetworkSpec, SamplePlan
from diffzoo.evaluation.reference import Reference, find_reference, make_reference
from diffzoo.evaluation.result import Result, compare
from diffzoo.evaluation.run import Settings, evaluate

__all__ = [
    "PRESETS",
    "EvalProtocol",
    "ImagesPlan",
    "NetworkSpec",
    "Reference",
    "Result",
    "SamplePlan",
    "Settings",
    "compare",
    "evaluate",
    "find_reference",
    "make_reference",
    "preset",
]
