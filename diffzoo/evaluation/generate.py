"""Images from a plan, seed by seed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from diffzoo import sampling
from diffzoo.errors import UserError, did_you_mean
from diffzoo.evaluation.records import Plan, SamplePlan
from diffzoo.metrics.features import float32_digits
from diffzoo.pipelines import Pipeline, pipeline
from diffzoo.process import GaussianProcess, to_config
from diffzoo.rng import keyed_generator
from diffzoo.sampling import Autoguidance, ClassifierFree, ClassifierGuidance, Denoiser, Sampler, sample
from diffzoo.sampling.upsample import quantise
from diffzoo.tensors import state_sha256
from diffzoo.typing import Condition
from diffzoo.zoo.metadata import FORMULAS, Metadata, guidance_from, sampler_from
from diffzoo.zoo.settings import setting_of

__all__ = ["Generator", "ImageSource", "ModelImages", "build_guidance", "build_sampler", "default_plan", "labels_of"]


class ImageSource(Protocol):
    """Images by position: a model with a plan, a folder, a file. It crosses process boundaries by pickling."""

    def images(self, start: int, count: int) -> Tensor:
        """Images `start` to `start + count`: uint8, or floats in [-1, 1], `(count, c, h, w)`."""

    def plan(self) -> Plan:
        """What goes into the record."""


WEAK = ("weak", "weak_average", "weak_sha256")  # fields of guidance about the weaker model
CLASSIFIER = ("classifier", "scale", "classifier_sha256")  # all fields of guidance by a classifier


# -- parts of a plan as data


def build_sampler(plan: SamplePlan) -> Sampler:
    """The sampler of a plan."""
    named = getattr(sampling, str(plan.sampler.get("class")), None)
    if isinstance(named, type) and not issubclass(named, Sampler):
        raise UserError(f"{named.__name__!r} is no sampler: the plan needs one such as DDIM or Heun")
    sampler: Sampler = sampler_from({**plan.sampler, "steps": plan.steps, "grid": dict(plan.grid)})
    return sampler


def build_guidance(
    denoise: Any,
    guidance: Mapping[str, Any] | None,
    null: Condition | None = None,
    weak: Any = None,
    classifier: Any = None,
    conditional: bool = True,
) -> Any:
    """A denoiser with the guidance of a plan around it.

    Args:
        denoise: a denoiser.
        guidance: as in `SamplePlan`; None = none.
        null: the row that stands for "no caption", for text models.
        weak: denoiser of the weaker model, where the plan names one.
        classifier: the noise-aware classifier, where the plan names one.
        conditional: whether the network itself is told the class; matters to guidance by a classifier alone.
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
        return ClassifierGuidance(denoise, classifier, guidance["scale"], conditional=conditional)
    values = guidance_from({k: v for k, v in guidance.items() if k not in WEAK})
    if values.get("scale") is None:
        raise UserError("guidance needs a scale, for example {'scale': 1.5}")
    values["per"] = "class" if isinstance(values.get("scale"), list | tuple) else "image"
    if "weak" in guidance:
        return Autoguidance(denoise, weak, **values)
    return ClassifierFree(denoise, **values, null=null)


def default_plan(model: str, metadata: Metadata, setting: str | None = None, **changes: Any) -> SamplePlan:
    """The plan that belongs to a set of weights: its published sampler and guidance, else DDIM and none.

    Args:
        model: what the plan names.
        facts: of the weights.
        setting: a published way to draw (`diffzoo.zoo.settings`); an upsampler begins with its first.
        changes: fields of the plan that differ.
    """
    chosen = setting_of(metadata, setting)
    sampler = to_config(sampler_from(dict(chosen.sampler)) if chosen.sampler else metadata.build_sampler())
    steps, grid = sampler.pop("steps"), sampler.pop("grid")
    config = metadata.build_config()
    classes = config.num_classes or chosen.classifier
    labels = "captions" if getattr(config, "text_width", 0) else (chosen.labels or "balanced") if classes else "none"
    guidance, base = None, None
    if metadata.guidance is not None:
        formula = FORMULAS[metadata.guidance["formula"]]
        guidance = {**metadata.guidance, "formula": formula, "scale": float(metadata.guidance["scale"])}
    if chosen.classifier is not None:
        guidance = {"classifier": chosen.classifier, "scale": chosen.scale}
    if chosen.base is not None:
        base = {"model": chosen.base, "setting": chosen.base_setting}
    known: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "labels": labels, "guidance": guidance}
    return SamplePlan(model, **{**known, "base": base, **changes})


# -- labels


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


# -- models


@dataclass
class Generator:
    """A network in memory with what it takes to draw images: what `ModelImages` loads and training has at hand.

    Args:
        network: in evaluation mode, on `device`.
        process: it was trained with.
        plan: how to draw.
        decode: from what the network draws to images in [-1, 1]; None in pixel space.
        text: conditions of the captions at some positions: (start, count) to a condition; None without captions.
        null: the row that stands for "no caption".
        device: where to compute.
        weak: denoiser of the weaker model of autoguidance.
        classifier: the noise-aware classifier that guides.
        base: of an upsampler: what draws the small pictures, in [-1, 1].
    """

    network: Any
    process: GaussianProcess
    plan: SamplePlan
    decode: Callable[[Tensor], Tensor] | None = None
    text: Callable[[int, int], Condition] | None = None
    null: Condition | None = None
    device: torch.device | str = "cpu"
    weak: Denoiser | None = None
    classifier: Any = None
    base: "ModelImages | None" = None

    @property
    def num_classes(self) -> int:
        """Classes to choose from: the network's, or those that the classifier tells apart."""
        guide = self.classifier.config.num_classes if self.classifier is not None else 0
        return int(self.network.config.num_classes or guide)

    def condition(self, start: int, count: int) -> Condition | None:
        """What to draw at some positions."""
        if self.plan.labels == "captions":
            if self.text is None:
                raise UserError("the plan draws captions but has none: give --captions FILE, one per line")
            return self.text(start, count)
        label = labels_of(self.plan, self.num_classes, start, count)
        low = quantise(self.base.images(start, count)) if self.base is not None else None
        cond = Condition(label=label, low_res=low)
        return cond if len(cond) else None

    def images(self, start: int, count: int) -> Tensor:
        """Images in [-1, 1] at some positions, `(count, c, h, w)`, float32 on the CPU."""
        plan, config = self.plan, self.network.config
        denoise = Denoiser(self.network, self.process)
        guided = build_guidance(
            denoise, plan.guidance, self.null, self.weak, self.classifier, conditional=config.num_classes > 0
        )
        with float32_digits(plan.precision == "fp32"):
            z = sample(
                guided,
                build_sampler(plan),
                (config.in_channels, config.image_size, config.image_size),
                range(plan.first_seed + start, plan.first_seed + start + count),
                self.condition(start, count),
                device=self.device,
                batch_size=plan.images_per_batch,
                precision=plan.precision if plan.precision in ("bf16", "fp16") else None,
            )
            if self.decode is None:
                return z
            with torch.no_grad():
                return torch.cat([self.decode(part.to(self.device)).float().cpu() for part in z.split(16)])


@dataclass
class ModelImages:
    """Images of a model by name, run or checkpoint. The network is loaded on first use, in each process.

    Args:
        sample_plan: how to draw; `sample_plan.model` says what to load.
        device: where to compute.
        captions: one per image, for text models.
    """

    sample_plan: SamplePlan
    device: str = "cpu"
    captions: Sequence[str] = field(default=(), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def pipe(self) -> Pipeline:
        """Network, process and companions."""
        plan = self.sample_plan
        by = (plan.guidance or {}).get("classifier")
        pipe = pipeline(plan.model, self.device, classifier=by, prefer=plan.average)
        pipe.network.requires_grad_(False)
        return pipe

    @cached_property
    def base(self) -> "ModelImages | None":
        """For an upsampler: the images that it enlarges, drawn from the same seeds and classes."""
        plan = self.sample_plan
        if plan.base is None:
            return None
        same: dict[str, Any] = {"first_seed": plan.first_seed, "labels": plan.labels, "classes": plan.classes}
        if plan.base.keys() <= {"model", "setting"}:
            pipe = pipeline(plan.base["model"], self.device, setting=plan.base.get("setting"))
            same |= {"precision": plan.precision, "images_per_batch": plan.images_per_batch}
            images = ModelImages(
                default_plan(plan.base["model"], pipe.metadata, plan.base.get("setting"), **same), self.device
            )
            images.__dict__["pipe"] = pipe
            return images
        return ModelImages(replace(SamplePlan.from_dict(plan.base), **same), self.device)

    @cached_property
    def weak(self) -> Pipeline | None:
        """The weaker model, if the plan guides with one."""
        guidance = self.sample_plan.guidance or {}
        if "weak" not in guidance:
            return None
        pipe = pipeline(guidance["weak"], self.device, prefer=guidance.get("weak_average", "average"))
        pipe.network.requires_grad_(False)
        return pipe

    @property
    def config(self) -> Any:
        """The config of the network."""
        return self.pipe.network.config

    @property
    def num_classes(self) -> int:
        """Classes to choose from; 0 = unconditional."""
        return self.pipe.class_count

    @property
    def image_size(self) -> int:
        """Height and width of its images in pixels."""
        return int(self.config.image_size) * self.pipe.autoencoder.ratio

    @cached_property
    def generator(self) -> Generator:
        """The generator, loaded."""
        pipe, latent = self.pipe, self.pipe.metadata.autoencoder is not None
        text, null = None, None
        if self.captions:
            text = self._text
            embedded, mask = pipe.text_encoder.null(1)
            null = Condition(text=embedded, text_mask=mask)
        decode = pipe.autoencoder.decode if latent else None
        weak = self.weak
        if self.sample_plan.compile:
            for each in (pipe, weak):
                if each is not None:
                    each.network.compile_units()
        return Generator(
            pipe.network,
            pipe.process,
            self.sample_plan,
            decode,
            text,
            null,
            self.device,
            weak.denoiser if weak else None,
            pipe.classifier,
            self.base,
        )

    def _text(self, start: int, count: int) -> Condition:
        captions = list(self.captions[start : start + count])
        if len(captions) < count:
            raise UserError(f"the plan has {len(self.captions)} captions; image {start + count - 1} has none")
        embedded, mask = self.pipe.text_encoder.encode(captions)
        return Condition(text=embedded, text_mask=mask)

    def images(self, start: int, count: int) -> Tensor:
        """Images in [-1, 1] at some positions."""
        return self.generator.images(start, count)

    def plan(self) -> SamplePlan:
        """The plan with the hash of the loaded weights; checks that sampler, guidance and classes fit the model."""
        plan, pipe = self.sample_plan, self.pipe
        build_sampler(plan)
        labels_of(plan, self.num_classes, 0, 1)
        if (pipe.condition_kind == "picture") != (self.base is not None):
            raise UserError(
                f"{plan.model} enlarges pictures and the plan does not say whose: give it a base"
                if self.base is None
                else f"{plan.model} draws without a smaller picture: leave the base out"
            )
        if plan.labels == "captions" and pipe.condition_kind != "caption":
            raise UserError(f"{plan.model} is no text-to-image model: leave the captions out")
        text = hashlib.sha256("\n".join(self.captions).encode()).hexdigest() if self.captions else None
        return replace(
            plan,
            weights_sha256=_weights_of(pipe, plan.model, plan.weights_sha256, "weights_sha256"),
            guidance=self._checked_guidance(),
            base=self.base.plan().to_dict() if self.base is not None else None,
            captions_sha256=text,
            autoencoder=pipe.autoencoder.id if pipe.metadata.autoencoder is not None else None,
        )

    def _checked_guidance(self) -> dict[str, Any] | None:
        """The plan's guidance with the hash of the weaker model's weights."""
        guidance, condition_kind = self.sample_plan.guidance, self.pipe.condition_kind
        if guidance is None:
            return None
        if "classifier" in guidance:
            build_guidance(self.pipe.denoiser, guidance, classifier=self.pipe.classifier)
            found = state_sha256(self.pipe.classifier.state_dict())
            return {**guidance, "classifier_sha256": _same(found, guidance.get("classifier_sha256"),
                                                           guidance["classifier"], "classifier_sha256")}  # fmt: skip
        scale, classes = guidance.get("scale"), self.config.num_classes
        if isinstance(scale, list | tuple) and len(scale) != classes:
            raise UserError(
                f"the plan has {len(scale)} guidance scales and the model {classes} classes: give one number, or one "
                "per class"
            )
        weak = self.weak
        if weak is None:
            if condition_kind == "nothing":
                raise UserError("the plan asks for guidance but the model is unconditional: leave the guidance out")
            build_guidance(self.pipe.denoiser, guidance)
            return guidance
        ours, theirs = self.config, weak.network.config
        if (ours.in_channels, ours.image_size, ours.num_classes) != (
            theirs.in_channels,
            theirs.image_size,
            theirs.num_classes,
        ):
            raise UserError(
                f"the weaker model {guidance['weak']} draws {theirs.in_channels} x {theirs.image_size} px, "
                f"{theirs.num_classes} classes, this one {ours.in_channels} x {ours.image_size} px, "
                f"{ours.num_classes} classes: autoguidance needs two of one kind"
            )
        build_guidance(self.pipe.denoiser, guidance, weak=weak.denoiser)
        found = _weights_of(weak, guidance["weak"], guidance.get("weak_sha256"), "weak_sha256")
        return {**guidance, "weak_sha256": found}


def _weights_of(pipe: Pipeline, name: str, wanted: str | None, field_: str) -> str:
    """Hash of the loaded weights; raises if the plan was made for others."""
    return _same(state_sha256(pipe.network.state_dict()), wanted, name, field_)


def _same(found: str, wanted: str | None, name: str, field_: str) -> str:
    if wanted not in (None, found):
        raise UserError(
            f"the plan was made for weights {wanted}, but {name} holds {found}: leave {field_} out to evaluate these"
        )
    return found


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """One thread on the CPU for the length of a block: sums split over threads round differently, and results must
    not depend on how many processes share the machine."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
