"""How images are made, as one frozen object with canonical JSON and a hash, and what follows from it alone.

Two runs with equal plans give equal images.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from diffzoo.errors import UserError, check_choice
from diffzoo.generation.guidance import ByClassifier, ByWeakerModel, guidance_from
from diffzoo.record import canonical_json, digest, from_plain
from diffzoo.rng import EARLIER_NOISE, NOISE, key
from diffzoo.sampling import DDIM, Guidance, Sampler
from diffzoo.sizes import Size, as_size
from diffzoo.zoo.metadata import Metadata

__all__ = [
    "Base", "LabelRule", "Record", "SamplePlan", "default_plan", "labels_of",
]  # fmt: skip

LabelRule = Literal["none", "balanced", "uniform", "captions"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class Record:
    """A frozen dataclass with a hash and JSON in and out."""

    def to_dict(self) -> dict[str, object]:
        """As JSON-ready data."""
        data: dict[str, object] = json.loads(canonical_json(self))
        return data

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return digest(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object], where: str = "") -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: `path.to.field: expected …, got …`.
        """
        return from_plain(cls, data, where)


@dataclass(frozen=True)
class Base:
    """The model whose images an upsampler enlarges, in one of its presets; a plan of it is filled in on loading."""

    model: str
    preset: str | None = None


@dataclass(frozen=True)
class SamplePlan(Record):
    """How images are made. Image i depends on seed `first_seed + i` and on this plan alone, so that 5,000 images are
    the first 5,000 of 50,000.

    Args:
        model: a registered name, a run, a checkpoint: what `diffzoo.zoo.load_any` takes.
        weights_sha256: hash of the network's tensors (`diffzoo.tensors.state_sha256`); filled in on loading.
        sampler: with its steps and grid.
        guidance: `Guidance` (a tuple of scales holds one per class of the model), `ByWeakerModel` or `ByClassifier`;
            None = none.
        first_seed: seed of the first image.
        labels: "balanced" = the classes in turn; "uniform" = at random for each seed, with replacement, as ADM does;
            "captions" = one caption per image; "none" = unconditional.
        classes: the class indices that labels come from; None = all classes of the model.
        captions_sha256: hash of the captions, one per line.
        precision: of the network: "fp32" with all digits; "tf32" = float32 with the fast products that torch is set to,
            on GPUs usually TF32 in convolutions; "bf16"; or "fp16".
        images_per_batch: images in one call of the network; a device rounds differently for different batches.
        autoencoder: id of the autoencoder that decodes latents, with its revision; filled in on loading.
        weights: which weights of a training run: "ema", "raw" or the label of an EMA.
        compile: compile the network's blocks, which rounds differently.
        base: of an upsampler: the plan of the model whose images it enlarges, or its name and preset, from which the
            plan is filled in on loading; seeds and classes are the same for both.
        noise: what draws the noise and the uniform labels (`diffzoo.rng.NOISE`); images of plans that name another
            cannot be made again.
        size: height and width of the images in pixels; None = the model's.

    `sampler`, `guidance` and `base` may be given as plain data.
    """

    model: str
    weights_sha256: str | None = None
    sampler: Sampler = DDIM(clip=1.0)  # noqa: RUF009  frozen
    guidance: Guidance | ByWeakerModel | ByClassifier | None = None
    first_seed: int = 0
    labels: LabelRule = "balanced"
    classes: tuple[int, ...] | None = None
    captions_sha256: str | None = None
    precision: Precision = "fp32"
    images_per_batch: int = 50
    autoencoder: str | None = None
    weights: str = "ema"
    compile: bool = False
    base: "SamplePlan | Base | None" = None
    noise: str = NOISE
    size: Size | None = field(default=None, metadata={"sparse": True})

    def __post_init__(self) -> None:
        decoded = {
            "sampler": from_plain(Sampler, self.sampler, "plan.sampler"),  # type: ignore[type-abstract]
            "guidance": guidance_from(self.guidance, "plan.guidance"),
            "base": _base_from(self.base),
        }
        for name, value in decoded.items():
            object.__setattr__(self, name, value)
        if self.size is not None:
            object.__setattr__(self, "size", as_size(self.size, "plan.size"))
        for name, kind in (("precision", Precision), ("labels", LabelRule)):
            check_choice(f"plan.{name}", getattr(self, name), kind)
        for name, least in (("first_seed", 0), ("images_per_batch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"plan.{name}: expected at least {least}, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, object], where: str = "plan") -> Self:
        """The inverse of `to_dict`; plans of earlier versions are understood."""
        values = _present_names(data)
        decoded = {"guidance": guidance_from(values.get("guidance"), f"{where}.guidance")}
        return from_plain(cls, {**values, **decoded, "base": _base_from(values.get("base"))}, where)


def _base_from(data: object) -> "SamplePlan | Base | None":
    if not isinstance(data, Mapping):
        return cast("SamplePlan | Base | None", data)
    values = {"preset" if key == "setting" else key: value for key, value in data.items()}
    if values.keys() <= {"model", "preset"}:
        return from_plain(Base, values, "plan.base")
    return SamplePlan.from_dict(data, "plan.base")


def _present_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in the words of this version: an earlier one wrote `average` for `weights`, "average" for "ema", and the
    sampler's steps and grid beside it."""
    values = dict(data)
    if values.get("weights_sha256"):  # images were made of it
        values.setdefault("noise", EARLIER_NOISE)
    if "average" in values:
        values["weights"] = _label(values.pop("average"))
    guidance = values.get("guidance")
    if isinstance(guidance, Mapping) and "weak_average" in guidance:
        rest = {k: v for k, v in guidance.items() if k != "weak_average"}
        values["guidance"] = {**rest, "weak_weights": _label(guidance["weak_average"])}
    beside = {key: values.pop(key) for key in ("steps", "grid") if key in values}
    if beside and isinstance(values.get("sampler"), Mapping):
        values["sampler"] = {**values["sampler"], **beside}
    return values


def _label(weights: str) -> str:
    return "ema" if weights == "average" else weights


def default_plan(model: str, metadata: Metadata, preset: str | None = None, **changes: Any) -> SamplePlan:
    """The plan that belongs to a set of weights: its published sampler and guidance, else DDIM and none.

    Args:
        model: what the plan names.
        metadata: of the weights.
        preset: a published way to sample (`diffzoo.zoo.Preset`); an upsampler begins with its first.
        changes: fields of the plan that differ.
    """
    chosen = metadata.preset(preset)
    config = metadata.config
    classes = config.num_classes or chosen.classifier
    labels = "captions" if config.text_width else (chosen.labels or "balanced") if classes else "none"
    known: dict[str, Any] = {
        "sampler": chosen.sampler or metadata.default_sampler,
        "labels": labels,
        "guidance": metadata.guidance,
    }
    if chosen.classifier is not None:
        known["guidance"] = ByClassifier(chosen.classifier, 1.0 if chosen.scale is None else chosen.scale)
    if chosen.base is not None:
        known["base"] = Base(chosen.base, chosen.base_preset)
    return SamplePlan(model, **{**known, **changes})


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
                f"the plan samples without labels but the model has {num_classes} classes: use labels 'balanced'"
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
    return torch.tensor([classes[key("label", s) % len(classes)] for s in seeds], dtype=torch.long)
