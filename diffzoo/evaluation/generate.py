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
from diffzoo.errors import UserError
from diffzoo.evaluation.records import Plan, SamplePlan
from diffzoo.metrics.weights import state_sha256
from diffzoo.pipelines import Pipeline, pipeline
from diffzoo.process import GaussianProcess, to_config
from diffzoo.rng import keyed_generator
from diffzoo.sampling import ClassifierFree, Denoiser, Sampler, sample
from diffzoo.typing import Condition
from diffzoo.zoo.facts import FORMULAS, Facts, guidance_from, sampler_from

__all__ = ["Generator", "ImageSource", "ModelImages", "build_guidance", "build_sampler", "default_plan", "labels_of"]


class ImageSource(Protocol):
    """Images by position: a model with a plan, a folder, a file. It crosses process boundaries by pickling."""

    def images(self, start: int, count: int) -> Tensor:
        """Images `start` to `start + count`: uint8, or floats in [-1, 1], `(count, c, h, w)`."""

    def plan(self) -> Plan:
        """What goes into the record."""


# -- parts of a plan as data


def build_sampler(plan: SamplePlan) -> Sampler:
    """The sampler of a plan."""
    named = getattr(sampling, str(plan.sampler.get("class")), None)
    if isinstance(named, type) and not issubclass(named, Sampler):
        raise UserError(f"{named.__name__!r} is no sampler: the plan needs one such as DDIM or Heun")
    sampler: Sampler = sampler_from({**plan.sampler, "steps": plan.steps, "grid": dict(plan.grid)})
    return sampler


def build_guidance(denoise: Any, guidance: Mapping[str, Any] | None, null: Condition | None = None) -> Any:
    """A denoiser with the guidance of a plan around it.

    Args:
        denoise: a denoiser.
        guidance: scale, formula, interval and decay of classifier-free guidance; None = none.
        null: the row that stands for "no caption", for text models.
    """
    if guidance is None:
        return denoise
    return ClassifierFree(denoise, **guidance_from(guidance), null=null)


def default_plan(model: str, facts: Facts, **changes: Any) -> SamplePlan:
    """The plan that belongs to a set of weights: its published sampler and guidance, else DDIM and none.

    Args:
        model: what the plan names.
        facts: of the weights.
        changes: fields of the plan that differ.
    """
    sampler = to_config(facts.build_sampler())
    steps, grid = sampler.pop("steps"), sampler.pop("grid")
    config = facts.build_config()
    labels = "captions" if getattr(config, "text_width", 0) else "balanced" if config.num_classes else "none"
    guidance = None
    if facts.guidance is not None:
        formula = FORMULAS[facts.guidance["formula"]]
        guidance = {**facts.guidance, "formula": formula, "scale": float(facts.guidance["scale"])}
    known: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "labels": labels, "guidance": guidance}
    return SamplePlan(model, **{**known, **changes})


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
    """

    network: Any
    process: GaussianProcess
    plan: SamplePlan
    decode: Callable[[Tensor], Tensor] | None = None
    text: Callable[[int, int], Condition] | None = None
    null: Condition | None = None
    device: torch.device | str = "cpu"

    def condition(self, start: int, count: int) -> Condition | None:
        """What to draw at some positions."""
        if self.plan.labels == "captions":
            if self.text is None:
                raise UserError("the plan draws captions but has none: give --captions FILE, one per line")
            return self.text(start, count)
        label = labels_of(self.plan, self.network.config.num_classes, start, count)
        return Condition(label=label) if label is not None else None

    def images(self, start: int, count: int) -> Tensor:
        """Images in [-1, 1] at some positions, `(count, c, h, w)`, float32 on the CPU."""
        plan, config = self.plan, self.network.config
        z = sample(
            build_guidance(Denoiser(self.network, self.process), plan.guidance, self.null),
            build_sampler(plan),
            (config.in_channels, config.image_size, config.image_size),
            range(plan.first_seed + start, plan.first_seed + start + count),
            self.condition(start, count),
            device=self.device,
            batch_size=plan.images_per_batch,
            precision=None if plan.precision == "fp32" else plan.precision,
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
        prefer: which weights of a training run: "average", "raw" or the label of an average.
    """

    sample_plan: SamplePlan
    device: str = "cpu"
    captions: Sequence[str] = field(default=(), repr=False)
    prefer: str = "average"

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def pipe(self) -> Pipeline:
        """Network, process and companions."""
        pipe = pipeline(self.sample_plan.model, self.device, prefer=self.prefer)
        pipe.network.requires_grad_(False)
        return pipe

    @property
    def config(self) -> Any:
        """The config of the network."""
        return self.pipe.network.config

    @property
    def image_size(self) -> int:
        """Height and width of its images in pixels."""
        return int(self.config.image_size) * self.pipe.autoencoder.ratio

    @cached_property
    def generator(self) -> Generator:
        """The generator, loaded."""
        pipe, latent = self.pipe, self.pipe.facts.autoencoder is not None
        text, null = None, None
        if self.captions:
            text = self._text
            embedded, mask = pipe.text_encoder.null(1)
            null = Condition(text=embedded, text_mask=mask)
        decode = pipe.autoencoder.decode if latent else None
        return Generator(pipe.network, pipe.process, self.sample_plan, decode, text, null, self.device)

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
        build_guidance(pipe.denoiser, plan.guidance)
        labels_of(plan, self.config.num_classes, 0, 1)
        if plan.labels == "captions" and pipe.reads != "caption":
            raise UserError(f"{plan.model} is no text-to-image model: leave the captions out")
        if plan.guidance is not None and pipe.reads == "nothing":
            raise UserError("the plan asks for guidance but the model is unconditional: leave the guidance out")
        found = state_sha256(pipe.network.state_dict())
        if plan.weights_sha256 not in (None, found):
            raise UserError(
                f"the plan was made for weights {plan.weights_sha256}, but {plan.model} holds {found}: "
                "leave weights_sha256 out to evaluate these"
            )
        text = hashlib.sha256("\n".join(self.captions).encode()).hexdigest() if self.captions else None
        autoencoder = pipe.autoencoder.id if pipe.facts.autoencoder is not None else None
        return replace(plan, weights_sha256=found, captions_sha256=text, autoencoder=autoencoder)


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
