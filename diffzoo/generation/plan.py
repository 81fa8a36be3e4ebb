"""How images are made, as one frozen object with canonical JSON and a hash, and what follows from it alone.

Two runs with equal plans give equal images.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.record import canonical_json, digest, from_plain, to_plain
from diffzoo.rng import keyed_generator
from diffzoo.sampling import Sampler
from diffzoo.zoo.metadata import Metadata

__all__ = [
    "LabelRule", "Record", "SamplePlan", "build_sampler", "default_plan", "labels_of",
]  # fmt: skip

LabelRule = Literal["none", "balanced", "uniform", "captions"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class Record:
    """JSON in and out for frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        data: dict[str, Any] = json.loads(canonical_json(self))
        return data

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return digest(self)

    @classmethod
    def _checked(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in data:
            if key not in known:
                raise UserError(f"{cls.__name__} has no field {key!r}{did_you_mean(key, known)}")
        return dict(data)


@dataclass(frozen=True)
class SamplePlan(Record):
    """How images are made. Image i depends on seed `first_seed + i` and on this plan alone, so that 5,000 images are
    the first 5,000 of 50,000.

    Args:
        model: a registered name, a run, a checkpoint: what `diffzoo.zoo.load_any` takes.
        weights_sha256: hash of the network's tensors (`diffzoo.tensors.state_sha256`); filled in on loading.
        sampler: class name and options of the sampler but its steps and grid, for example {"class": "DDIM"}.
        steps: of the sampler.
        grid: class name and options of the time grid.
        guidance: of classifier-free guidance, for example {"scale": 1.5, "formula": "uncond"}, perhaps with "interval"
            {"low": ..., "high": ..., "unit": ...} or "decay"; a list of scales holds one per class of the model. With
            "weak", the name of a weaker model, autoguidance; "weak_weights" and "weak_sha256" say which of its
            weights. With "classifier", the name of a noise-aware classifier, and a "scale", its guidance;
            "classifier_sha256" is filled in. None = no guidance.
        first_seed: seed of the first image.
        labels: "balanced" = the classes in turn; "uniform" = drawn for each seed, with replacement, as ADM does;
            "captions" = one caption per image; "none" = unconditional.
        classes: the class indices that labels come from; None = all classes of the model.
        captions_sha256: hash of the captions, one per line.
        precision: of the network: "fp32" with all digits; "tf32" = float32 with the fast products that torch is set to,
            on GPUs usually TF32 in convolutions; "bf16"; or "fp16".
        images_per_batch: images in one call of the network; a device rounds differently for different batches.
        autoencoder: id of the autoencoder that decodes latents, with its revision; filled in on loading.
        weights: which weights of a training run: "ema", "raw" or the label of an EMA.
        compile: compile the network's blocks, which rounds differently.
        base: of an upsampler: the plan of the model whose images it enlarges, or {model, preset}, which is filled in
            on loading; seeds and classes are the same for both.
    """

    model: str
    weights_sha256: str | None = None
    sampler: dict[str, Any] = field(default_factory=lambda: {"class": "DDIM", "clip": 1.0})
    steps: int = 50
    grid: dict[str, Any] = field(default_factory=lambda: {"class": "UniformTime"})
    guidance: dict[str, Any] | None = None
    first_seed: int = 0
    labels: LabelRule = "balanced"
    classes: tuple[int, ...] | None = None
    captions_sha256: str | None = None
    precision: Precision = "fp32"
    images_per_batch: int = 50
    autoencoder: str | None = None
    weights: str = "ema"
    compile: bool = False
    base: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("precision", Precision), ("labels", LabelRule)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"plan.{name}: expected one of {get_args(kind)}, got {getattr(self, name)!r}")
        for name, least in (("first_seed", 0), ("images_per_batch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"plan.{name}: expected at least {least}, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown fields raise."""
        values = cls._checked(_present_names(data))
        classes = values.get("classes")
        return cls(**{**values, "classes": tuple(classes) if classes is not None else None})


def _present_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in the words of this version: an earlier one wrote `average` for `weights`, and "average" for "ema"."""
    values = dict(data)
    if "average" in values:
        values["weights"] = _label(values.pop("average"))
    guidance = values.get("guidance")
    if isinstance(guidance, Mapping) and "weak_average" in guidance:
        rest = {k: v for k, v in guidance.items() if k != "weak_average"}
        values["guidance"] = {**rest, "weak_weights": _label(guidance["weak_average"])}
    if isinstance(values.get("base"), Mapping):
        base = _present_names(values["base"])
        values["base"] = {"preset" if key == "setting" else key: value for key, value in base.items()}
    return values


def _label(weights: str) -> str:
    return "ema" if weights == "average" else weights


def build_sampler(plan: SamplePlan) -> Sampler:
    """The sampler of a plan."""
    data = {**plan.sampler, "steps": plan.steps, "grid": dict(plan.grid)}
    return from_plain(Sampler, data, "plan.sampler")  # type: ignore[type-abstract]


def default_plan(model: str, metadata: Metadata, preset: str | None = None, **changes: Any) -> SamplePlan:
    """The plan that belongs to a set of weights: its published sampler and guidance, else DDIM and none.

    Args:
        model: what the plan names.
        metadata: of the weights.
        preset: a published way to sample (`diffzoo.zoo.Preset`); an upsampler begins with its first.
        changes: fields of the plan that differ.
    """
    chosen = metadata.preset(preset)
    sampler = to_plain(chosen.sampler or metadata.default_sampler)
    steps, grid = sampler.pop("steps"), sampler.pop("grid")
    config = metadata.config
    classes = config.num_classes or chosen.classifier
    labels = "captions" if getattr(config, "text_width", 0) else (chosen.labels or "balanced") if classes else "none"
    guidance, base = None, None
    if metadata.guidance is not None:
        guidance = to_plain(metadata.guidance, sparse=True)
    if chosen.classifier is not None:
        guidance = {"classifier": chosen.classifier, "scale": chosen.scale}
    if chosen.base is not None:
        base = {"model": chosen.base, "preset": chosen.base_preset}
    known: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "labels": labels, "guidance": guidance}
    return SamplePlan(model, **{**known, "base": base, **changes})


def labels_of(plan: SamplePlan, num_classes: int, start: int, count: int) -> Tensor | None:
    """Class indices of some images, `(count,)`; each depends on its own seed alone.

    Args:
        plan: with its rule and its classes.
        num_classes: of the model; 0 = unconditional.
        start, count: which images.

    Raises:
        UserError: if the plan's classes do not fit the model.
    """
    if plan.labels in ("none", "captions"):
        if plan.classes is not None:
            raise UserError(f"the plan lists classes but its label rule is {plan.labels!r}: leave the classes out")
        if plan.labels == "none" and num_classes:
            raise UserError(
                f"the plan draws without labels but the model has {num_classes} classes: use labels 'balanced'"
            )
        return None
    if not num_classes:
        if plan.classes is None:
            return None
        raise UserError(f"the plan lists {len(plan.classes)} classes but the model is unconditional: leave them out")
    classes = list(range(num_classes)) if plan.classes is None else list(plan.classes)
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong or not classes:
        raise UserError(
            f"the plan's classes do not fit the model: {wrong[0] if wrong else 'the list is empty'}; "
            f"the model has classes 0 to {num_classes - 1}"
        )
    seeds = range(plan.first_seed + start, plan.first_seed + start + count)
    if plan.labels == "balanced":
        return torch.tensor([classes[s % len(classes)] for s in seeds], dtype=torch.long)
    return torch.tensor([classes[_draw(s, len(classes))] for s in seeds], dtype=torch.long)


def _draw(seed: int, count: int) -> int:
    return int(torch.randint(count, (), generator=keyed_generator("cpu", "label", seed)))
