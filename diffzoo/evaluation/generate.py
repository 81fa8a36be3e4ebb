"""Images from a plan, seed by seed."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

import diffzoo.sampling as sampling
from diffzoo.encoders.autoencoder import KLAutoencoder
from diffzoo.encoders.text import CLIPEncoder, T5Encoder, TextEncoder
from diffzoo.errors import UserError, did_you_mean
from diffzoo.evaluation.records import Plan, SamplePlan
from diffzoo.metrics.weights import state_sha256
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess
from diffzoo.rng import keyed_generator
from diffzoo.sampling import ClassifierFree, Denoiser, Grid, Sampler, sample
from diffzoo.typing import Condition

__all__ = ["Generator", "ImageSource", "ModelImages", "build_guidance", "build_sampler", "labels_of", "part_to_dict"]


class ImageSource(Protocol):
    """Images by position: a model with a plan, a folder, a file. It crosses process boundaries by pickling."""

    def images(self, start: int, count: int) -> Tensor:
        """Images `start` to `start + count`: uint8, or floats in [-1, 1], `(count, c, h, w)`."""

    def plan(self) -> Plan:
        """What goes into the record."""


# -- parts of a plan as data


def part_to_dict(part: Any) -> Any:
    """A sampler, grid or fade as JSON-ready data with its class name."""
    if is_dataclass(part) and not isinstance(part, type):
        return {"class": type(part).__name__, **{f.name: part_to_dict(getattr(part, f.name)) for f in fields(part)}}
    return list(part) if isinstance(part, tuple) else part


def _build(data: Mapping[str, Any], base: type, what: str, **more: Any) -> Any:
    values = {**data, **more}
    name = values.pop("class", None)
    known = {n for n in sampling.__all__ if isinstance(getattr(sampling, n), type)}
    known = {n for n in known if issubclass(getattr(sampling, n), base) and getattr(sampling, n) is not base}
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(str(name), known)}")
    cls = getattr(sampling, name)
    accepted = {f.name for f in fields(cls)}
    for key in values:
        if key not in accepted:
            raise UserError(f"{what} {name} has no argument {key!r}{did_you_mean(key, accepted)}")
    return cls(**values)


def build_sampler(plan: SamplePlan) -> Sampler:
    """The sampler of a plan."""
    grid = _build(plan.grid, Grid, "time grid")
    sampler: Sampler = _build(plan.sampler, Sampler, "sampler", steps=plan.steps, grid=grid)
    return sampler


def build_guidance(denoise: Any, guidance: Mapping[str, Any] | None) -> Any:
    """A denoiser with the guidance of a plan around it."""
    if guidance is None:
        return denoise
    values = dict(guidance)
    name = values.pop("class", "ClassifierFree")
    if name != "ClassifierFree":
        raise UserError(f"a plan's guidance is ClassifierFree, got {name!r}")
    accepted = {"scale", "formula", "interval", "decay"}
    for key in values:
        if key not in accepted:
            raise UserError(f"guidance has no argument {key!r}{did_you_mean(key, accepted)}")
    for key in ("interval", "decay"):
        if values.get(key) is not None:
            default = {"class": "Interval" if key == "interval" else "PowerCosine"}
            values[key] = _build({**default, **values[key]}, sampling.Fade, f"guidance {key}")
    return ClassifierFree(denoise, **values)


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
        text: one condition row per caption, for text models: start, count to a condition.
        device: where to compute.
    """

    network: Network
    process: GaussianProcess
    plan: SamplePlan
    decode: Any = None
    text: Any = None
    device: torch.device | str = "cpu"

    def condition(self, start: int, count: int) -> Condition | None:
        """What to draw at some positions."""
        if self.plan.labels == "captions":
            if self.text is None:
                raise UserError("the plan draws captions, but there is no text encoder or no list of captions")
            condition: Condition = self.text(start, count)
            return condition
        label = labels_of(self.plan, self.network.config.num_classes, start, count)
        return Condition(label=label) if label is not None else None

    def images(self, start: int, count: int) -> Tensor:
        """Images in [-1, 1] at some positions, `(count, c, h, w)`, float32 on the CPU."""
        plan, config = self.plan, self.network.config
        denoise = build_guidance(Denoiser(self.network, self.process), plan.guidance)
        z = sample(
            denoise,
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
        sample_plan: how to draw; `plan.model` says what to load.
        device: where to compute.
        captions: one per image, for text models.
        prefer: which weights of a training run: "average" or "raw".
    """

    sample_plan: SamplePlan
    device: str = "cpu"
    captions: Sequence[str] = field(default=(), repr=False)
    prefer: str = "average"

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def loaded(self) -> Any:
        """The network, its process and what is known about them."""
        from diffzoo.zoo.loading import load_any

        loaded = load_any(self.sample_plan.model, prefer=self.prefer)
        loaded.network.requires_grad_(False).to(self.device)
        return loaded

    @cached_property
    def autoencoder(self) -> KLAutoencoder | None:
        """The autoencoder of a latent model."""
        facts = self.loaded.facts.autoencoder
        if not facts:
            return None
        known = ("repo", "scaling_factor", "revision", "subfolder")
        return KLAutoencoder(**{k: facts[k] for k in known if k in facts}).to(self.device)

    @cached_property
    def generator(self) -> Generator:
        """The generator, loaded."""
        decode = self.autoencoder.decode if self.autoencoder is not None else None
        text = _Captions(self) if self.captions else None
        return Generator(self.loaded.network, self.loaded.process, self.sample_plan, decode, text, self.device)

    def images(self, start: int, count: int) -> Tensor:
        """Images in [-1, 1] at some positions."""
        return self.generator.images(start, count)

    def plan(self) -> SamplePlan:
        """The plan with the hash of the loaded weights; checks that sampler, guidance and classes fit the model."""
        config = self.loaded.network.config
        build_sampler(self.sample_plan)
        build_guidance(Denoiser(self.loaded.network, self.loaded.process), self.sample_plan.guidance)
        labels_of(self.sample_plan, config.num_classes, 0, 1)
        if self.sample_plan.guidance is not None and not (config.num_classes or self.captions):
            raise UserError("the plan asks for guidance but the model is unconditional: leave the guidance out")
        found = state_sha256(self.loaded.network.state_dict())
        if self.sample_plan.weights_sha256 not in (None, found):
            raise UserError(
                f"the plan was made for weights {self.sample_plan.weights_sha256}, but {self.sample_plan.model} "
                f"holds {found}: leave weights_sha256 out to evaluate these"
            )
        text = hashlib.sha256("\n".join(self.captions).encode()).hexdigest() if self.captions else None
        return replace(
            self.sample_plan,
            weights_sha256=found,
            captions_sha256=text,
            autoencoder=self.autoencoder.id if self.autoencoder is not None else None,
        )


@dataclass
class _Captions:
    """Conditions of a list of captions, encoded where they are needed."""

    owner: ModelImages

    @cached_property
    def _encoder(self) -> TextEncoder:
        facts = self.owner.loaded.facts.text_encoder
        if not facts:
            raise UserError(f"{self.owner.sample_plan.model} is no text-to-image model: leave the captions out")
        repo, revision = str(facts["repo"]), facts.get("revision")
        encoder: TextEncoder
        if "t5" in repo.lower():
            encoder = T5Encoder(repo, revision, max_tokens=facts.get("length") or 128)
        else:  # the published models on CLIP read all of its tokens, padding included
            encoder = CLIPEncoder(repo, revision, max_tokens=facts.get("length"), keep_padding=True)
        return encoder.to(self.owner.device)

    def __call__(self, start: int, count: int) -> Condition:
        captions = list(self.owner.captions[start : start + count])
        if len(captions) < count:
            raise UserError(f"the plan has {len(self.owner.captions)} captions; image {start + count - 1} has none")
        text, mask = self._encoder.encode(captions)
        return Condition(text=text, text_mask=mask)


@contextmanager
def one_thread(device: str) -> Any:
    """One thread on the CPU for the length of a block: sums split over threads round differently, and results must
    not depend on how many processes share the machine."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
