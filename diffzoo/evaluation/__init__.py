"""Evaluation whose numbers can be trusted and repeated: plans, protocols, resumable runs, records."""

from diffzoo.evaluation.image_files import ImagesPlan
from diffzoo.evaluation.protocols import PROTOCOLS, EvalProtocol, NetworkSpec, protocol
from diffzoo.evaluation.reference import Reference, find_reference, make_reference
from diffzoo.evaluation.result import Result, compare
from diffzoo.evaluation.run import RunOptions, evaluate
from diffzoo.generation.plan import SamplePlan

__all__ = [
    "PROTOCOLS",
    "EvalProtocol",
    "ImagesPlan",
    "NetworkSpec",
    "Reference",
    "Result",
    "RunOptions",
    "SamplePlan",
    "compare",
    "evaluate",
    "find_reference",
    "make_reference",
    "protocol",
]
