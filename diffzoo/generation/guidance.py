"""Kinds of guidance as records: classifier-free (`diffzoo.sampling.Guidance`), by a weaker model, by a classifier."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffzoo.errors import UserError
from diffzoo.record import from_plain
from diffzoo.sampling import Guidance

__all__ = ["AnyGuidance", "ByClassifier", "ByWeakerModel", "guidance_from", "no_guidance"]


@dataclass(frozen=True)
class ByWeakerModel(Guidance):
    """Autoguidance: away from a weaker model (arXiv:2406.02507).

    Args:
        weak: its name: what `diffzoo.zoo.load_any` takes.
        weak_weights: which of its weights: "ema", "raw" or the label of an EMA.
        weak_sha256: hash of its tensors; filled in on loading.
    """

    weak: str = ""
    weak_weights: str = "ema"
    weak_sha256: str | None = None


@dataclass(frozen=True)
class ByClassifier:
    """Guidance by a noise-aware classifier (arXiv:2105.05233).

    Args:
        classifier: its name: what `diffzoo.zoo.load_any` takes.
        scale: 0 = none.
        classifier_sha256: hash of its tensors; filled in on loading.
    """

    classifier: str
    scale: float
    classifier_sha256: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance needs a finite scale, got {self.scale}")


AnyGuidance = Guidance | ByWeakerModel | ByClassifier


def guidance_from(data: object, where: str = "guidance") -> AnyGuidance | None:
    """Guidance from plain data, whose fields say which kind it is.

    Raises:
        UserError: for unknown fields and values that do not fit.
    """
    if not isinstance(data, Mapping):
        return data if data is None or isinstance(data, Guidance | ByClassifier) else from_plain(Guidance, data, where)
    if "classifier" in data:
        return from_plain(ByClassifier, data, where)
    return from_plain(ByWeakerModel if "weak" in data else Guidance, data, where)


def no_guidance(guidance: AnyGuidance | None) -> float:
    """The scale that changes nothing: 1 in the formula "uncond", 0 in "cond" and of a classifier."""
    return 0.0 if isinstance(guidance, ByClassifier) or (guidance is not None and guidance.formula == "cond") else 1.0
