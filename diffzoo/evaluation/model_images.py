"""Images of a model by name, from a plan, seed by seed."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch

from diffzoo.encoders import Identity
from diffzoo.errors import UserError
from diffzoo.generation.generator import Generator, PlannedImages
from diffzoo.generation.guidance import AnyGuidance, ByClassifier, ByWeakerModel
from diffzoo.generation.plan import Base, SamplePlan, default_plan, labels_of
from diffzoo.models.base import Config, Network
from diffzoo.rng import NOISE
from diffzoo.sizes import Size, size_text
from diffzoo.tensors import state_sha256
from diffzoo.typing import Condition, Images
from diffzoo.zoo.loading import load_any

__all__ = ["ModelImages", "one_thread"]


@dataclass
class ModelImages:
    """Images of a model by name, run or checkpoint. The network is loaded on first use, in each process.

    Args:
        sample_plan: how to sample; `sample_plan.model` says what to load.
        device: where to compute.
        captions: one per image, for text models.
        loaded: the model, where it is in memory already; other processes load it by name.
    """

    sample_plan: SamplePlan
    device: str = "cpu"
    captions: Sequence[str] = field(default=(), repr=False)
    loaded: Generator | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "loaded": None}

    @cached_property
    def generator(self) -> Generator:
        """The network with its frozen encoders and guides, compiled if the plan says so."""
        plan, guidance = self.sample_plan, self.sample_plan.guidance
        if plan.noise != NOISE:
            raise UserError(
                f"plan.noise: expected {NOISE!r}, got {plan.noise!r}: this version cannot make these images again; "
                "leave noise out to make others of the same plan"
            )
        generator = self.loaded or Generator.of(load_any(plan.model, weights=plan.weights), self.device)
        generator = replace(generator, classifier=None, weak=self.weak.denoiser if self.weak else None)
        if isinstance(guidance, ByClassifier):
            generator.guide_with(load_any(guidance.classifier))
        if plan.compile:
            for each in (generator, self.weak):
                if each is not None:
                    each.network.compile_units()
        return generator

    @cached_property
    def weak(self) -> Generator | None:
        """The weaker model, if the plan guides with one."""
        guidance = self.sample_plan.guidance
        if not isinstance(guidance, ByWeakerModel):
            return None
        return Generator.of(load_any(guidance.weak, weights=guidance.weak_weights), self.device)

    @cached_property
    def base(self) -> "ModelImages | None":
        """For an upsampler: the images that it enlarges, from the same seeds and classes."""
        plan = self.sample_plan
        if plan.base is None:
            return None
        same: dict[str, Any] = {"first_seed": plan.first_seed, "labels": plan.labels, "classes": plan.classes}
        if isinstance(plan.base, Base):
            same |= {"precision": plan.precision, "images_per_batch": plan.images_per_batch}
            loaded = load_any(plan.base.model)
            base = default_plan(plan.base.model, loaded.metadata, plan.base.preset, **same)
            return ModelImages(base, self.device, loaded=Generator.of(loaded, self.device))
        return ModelImages(replace(plan.base, **same), self.device)

    @cached_property
    def _planned(self) -> PlannedImages:
        return PlannedImages(self.generator, self.sample_plan, self.captions, self.base)

    @property
    def num_classes(self) -> int:
        """Classes to choose from; 0 = unconditional."""
        return self.generator.num_classes

    @property
    def image_size(self) -> Size:
        """Height and width of its images in pixels."""
        return self.generator.at(self.sample_plan.size).image_size

    def condition(self, start: int, count: int) -> Condition | None:
        """What is sampled at some positions."""
        return self._planned.condition(start, count)

    def images(self, start: int, count: int) -> Images:
        """Images in [-1, 1] at some positions."""
        return self._planned.images(start, count)

    def plan(self) -> SamplePlan:
        """The plan with the hash of the loaded weights; checks that sampler, guidance and classes fit the model."""
        plan, generator = self.sample_plan, self.generator
        labels_of(plan, self.num_classes, 0, 1)
        if (generator.kind == "image") != (self.base is not None):
            raise UserError(
                f"{plan.model} enlarges images and the plan does not say whose: give it a base"
                if self.base is None
                else f"{plan.model} samples without a smaller image: leave the base out"
            )
        if plan.labels == "captions" and generator.kind != "caption":
            raise UserError(f"{plan.model} is no text-to-image model: leave the captions out")
        text = hashlib.sha256("\n".join(self.captions).encode()).hexdigest() if self.captions else None
        return replace(
            plan,
            weights_sha256=_hash_of(generator.network, plan.model, plan.weights_sha256, "weights_sha256"),
            guidance=self._checked_guidance(),
            base=self.base.plan() if self.base is not None else None,
            captions_sha256=text,
            autoencoder=None if isinstance(generator.autoencoder, Identity) else generator.autoencoder.id,
        )

    def _checked_guidance(self) -> AnyGuidance | None:
        """The plan's guidance with the hashes of the weights that guide."""
        guidance, generator, weak = self.sample_plan.guidance, self.generator, self.weak
        if guidance is None:
            return None
        config = generator.network.config
        if isinstance(guidance, ByClassifier):
            wanted = guidance.classifier_sha256
            found = _hash_of(generator.classifier, guidance.classifier, wanted, "classifier_sha256")
            return replace(guidance, classifier_sha256=found)
        if isinstance(guidance.scale, tuple) and len(guidance.scale) != config.num_classes:
            raise UserError(
                f"the plan has {len(guidance.scale)} guidance scales and the model {config.num_classes} classes: give "
                "one number, or one per class"
            )
        if weak is None and generator.kind == "nothing":
            if not guidance.acts:
                return None
            raise UserError("the plan asks for guidance but the model is unconditional: leave the guidance out")
        generator.guided(guidance)
        if not isinstance(guidance, ByWeakerModel) or weak is None:
            return guidance
        ours, theirs = _kind_of(config), _kind_of(weak.network.config)
        if theirs not in (ours, _kind_of(config.override(num_classes=0))):
            raise UserError(
                f"the weaker model {guidance.weak} samples {theirs}, this one {ours}: autoguidance needs two of one "
                "kind"
            )
        found = _hash_of(weak.network, guidance.weak, guidance.weak_sha256, "weak_sha256")
        return replace(guidance, weak_sha256=found)


def _kind_of(config: Config) -> str:
    return f"{config.in_channels} x {size_text(config.image_size)} px, {config.num_classes} classes"


def _hash_of(network: Network, name: str, wanted: str | None, field_: str) -> str:
    """Hash of loaded weights; raises if the plan was made for others."""
    found = state_sha256(network.state_dict())
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
