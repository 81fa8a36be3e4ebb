"""Guidance from plain data: the one place where a denoiser gets its guidance."""

import math
from collections.abc import Mapping
from typing import Any

from diffzoo.errors import UserError, did_you_mean
from diffzoo.record import from_plain
from diffzoo.sampling import ClassifierGuidance, Denoise, Guidance
from diffzoo.sampling.classifier import NoiseAwareClassifier
from diffzoo.typing import Condition

__all__ = ["build_guidance", "no_guidance"]

WEAK = ("weak", "weak_weights", "weak_sha256")  # fields of guidance about the weaker model
CLASSIFIER = ("classifier", "scale", "classifier_sha256")  # all fields of guidance by a classifier


def no_guidance(guidance: Mapping[str, Any] | None) -> float:
    """The scale that changes nothing: 1 in the formula "uncond", 0 in "cond" and of a classifier."""
    if guidance is None:
        return 1.0
    return 0.0 if "classifier" in guidance or guidance.get("formula") == "cond" else 1.0


def build_guidance(
    denoise: Denoise,
    guidance: Mapping[str, Any] | None,
    null: Condition | None = None,
    weak: Denoise | None = None,
    classifier: NoiseAwareClassifier | None = None,
    conditional: bool = True,
) -> Denoise:
    """A denoiser with guidance around it.

    Args:
        denoise: a denoiser.
        guidance: as in `SamplePlan`; None = none.
        null: the row that stands for "no caption", for text models.
        weak: denoiser of the weaker model, where `guidance` names one.
        classifier: the noise-aware classifier, where `guidance` names one.
        conditional: whether the network itself reads the class; matters to guidance by a classifier alone.

    Raises:
        UserError: for an unknown field, or a scale that is missing or not finite.
    """
    if guidance is None:
        return denoise
    if "classifier" in guidance:
        wrong = [k for k in guidance if k not in CLASSIFIER]
        if wrong:
            raise UserError(
                f"guidance by a classifier has no argument {wrong[0]!r}{did_you_mean(wrong[0], CLASSIFIER)}"
            )
        if not isinstance(guidance.get("scale"), int | float):
            raise UserError(f"guidance by a classifier needs one scale, got {guidance.get('scale')!r}")
        assert classifier is not None
        return ClassifierGuidance(denoise, classifier, _finite(guidance["scale"]), conditional=conditional)
    known = from_plain(Guidance, {k: v for k, v in guidance.items() if k not in WEAK}, "guidance")
    for scale in known.scale if isinstance(known.scale, tuple) else (known.scale,):
        _finite(scale)
    return known.around(denoise, null, weak if "weak" in guidance else None)


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise UserError(f"guidance needs a finite scale, got {scale}")
    return float(scale)
