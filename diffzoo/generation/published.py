"""Sampling as published: class names, default sampler and guidance of the weights, and the record of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict, Unpack

import torch

from diffzoo import __version__
from diffzoo.encoders.autoencoder import Identity
from diffzoo.errors import UserError
from diffzoo.generation.classes import Classes
from diffzoo.generation.generator import Generator
from diffzoo.generation.guidance import AnyGuidance, ByClassifier
from diffzoo.generation.samples import Samples
from diffzoo.images import to_uint8
from diffzoo.pins import encoder_record, read_record
from diffzoo.record import from_plain, to_plain
from diffzoo.rng import NOISE
from diffzoo.sampling import Guidance, Sampler, Trajectory
from diffzoo.sampling.loop import Precision
from diffzoo.sizes import Size
from diffzoo.typing import Condition, Images, Latents
from diffzoo.zoo.building import Loaded
from diffzoo.zoo.metadata import Metadata, class_list

__all__ = ["Options", "Published", "Request", "Speed", "listed"]

BATCH = 16  # images at a time where a call says nothing

_DTYPES: dict[Precision | None, str] = {None: "float32", "bf16": "bfloat16", "fp16": "float16"}


def listed(classes: Sequence[str | int] | str | int | None) -> list[str | int] | None:
    """One class or several as a list."""
    if classes is None:
        return None
    return [classes] if isinstance(classes, str | int) else list(classes)


class Speed(TypedDict, total=False):
    """Images at a time, progress bar, precision of the network, and what collects x_hat on the way."""

    batch_size: int | None
    progress: bool | None
    precision: Precision | None
    trajectory: Trajectory | None


class Options(Speed, total=False):
    """How to sample, where a call does not take the published way."""

    guidance: float | Mapping[str, object] | None
    steps: int | None
    sampler: Sampler | str | None


@dataclass(frozen=True)
class Request:
    """What a call samples, a row per image.

    Args:
        seeds: of the images.
        labels: a readable label for each image.
        ids: class of each; empty where there are none.
        cond: what to sample; None for unconditional models.
        sampler: how.
        guidance: as a generator takes it; None where it changes nothing.
        record: of the guidance.
        columns: images per class.
        speed: with the batch size.
    """

    seeds: list[int]
    labels: list[str]
    ids: list[int]
    cond: Condition | None
    sampler: Sampler
    guidance: AnyGuidance | None
    record: dict[str, object] | None
    columns: int
    speed: Speed


@dataclass
class Published:
    """Turns what a user asks for into what a generator takes, with the defaults of the weights.

    Args:
        generator: what samples.
        metadata: of its weights.
        classifier: the one that guides, or None.
        scale: of classifier guidance where a call names none.
    """

    generator: Generator
    metadata: Metadata
    classifier: Loaded | None = None
    scale: float | None = None

    @cached_property
    def classes(self) -> Classes:
        """The classes to choose from: the network's, or those that a classifier guides towards."""
        guide = self.classifier.metadata.class_names if self.classifier else ()
        return Classes(self.generator.num_classes, class_list(self.metadata.class_names or guide))

    def request(
        self,
        classes: Sequence[str | int] | str | int | None,
        seeds: Sequence[int],
        guidance: float | Mapping[str, object] | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        **speed: Unpack[Speed],
    ) -> Request:
        """Every class with every seed, class by class.

        Raises:
            UserError: for classes, seeds or guidance that the model cannot sample.
        """
        seeds = [int(s) for s in seeds]
        if not seeds:
            raise UserError("there are no seeds: give at least one, for example range(8)")
        labels, ids, cond = self.condition(listed(classes))
        every = torch.arange(len(labels)).repeat_interleave(len(seeds))
        applied, record = self.guidance(guidance)
        return Request(
            seeds * len(labels),
            [labels[i] for i in every],
            [ids[i] for i in every] if ids else [],
            cond[every] if cond is not None else None,
            self.sampler(sampler, steps),
            applied,
            record,
            len(seeds),
            {"batch_size": BATCH, "progress": None, **speed},
        )

    def sample(
        self,
        request: Request,
        size: Size | None = None,
        start: Latents | None = None,
        compile: bool = False,
        **more: object,
    ) -> Samples:
        """The images of a request, with a record each.

        Args:
            request: what to sample, and how.
            size: height and width in pixels; None = those of the model.
            start: the states to begin with, in place of noise from the seeds.
            compile: compile the network first.
            more: what goes into the records besides.
        """
        images = self.generator.at(size).images(
            request.seeds,
            request.cond,
            sampler=request.sampler,
            guidance=request.guidance,
            start=start,
            compile=compile,
            **request.speed,
        )
        return self.samples(images, request, **(more or ({} if start is None else {"start": "given"})))

    def condition(self, items: Sequence[str | int] | None) -> tuple[list[str], list[int], Condition | None]:
        """A label, a class where there are classes, and a row of conditions for each item."""
        kind = self.generator.kind
        if kind == "image":
            # the pipeline has sampled the small images where there is a base
            raise UserError(
                "this model enlarges images: it needs low-resolution images, not classes alone; sample them with a "
                "smaller model and pass them to `upsample`"
            )
        if kind == "nothing":
            if items:
                raise UserError("this model is unconditional: leave out the classes")
            return [""], [], None
        if not items:
            example = '["a red heart"]' if kind == "caption" else "[0, 1]"
            raise UserError(f"this model samples from a {kind}: say which, for example {example}")
        if kind == "caption":
            captions = [str(item) for item in items]
            return captions, [], self.generator.captions(captions)
        ids = [self.classes.index(item) for item in items]
        return [self.classes.label(i) for i in ids], ids, Condition(label=torch.tensor(ids))

    def guidance(
        self, guidance: float | Mapping[str, object] | None
    ) -> tuple[AnyGuidance | None, dict[str, object] | None]:
        """The guidance of a call, and its record; the first is None where it changes nothing."""
        if self.classifier is not None:
            if isinstance(guidance, Mapping):
                raise UserError("a classifier does the guidance: give its scale as a number")
            scale = (1.0 if self.scale is None else self.scale) if guidance is None else float(guidance)
            by = ByClassifier(self.classifier.metadata.title, scale)
            return by, {"formula": "score + s * grad log p(class)", **to_plain(by, sparse=True)}
        if self.generator.kind in ("nothing", "image"):
            if guidance is not None:
                raise UserError("this model has no condition that guidance could act on: leave the guidance out")
            return None, None
        known = self.metadata.guidance or Guidance(1.0)
        if guidance is not None:
            change = guidance if isinstance(guidance, Mapping) else {"scale": guidance}
            known = from_plain(Guidance, {**to_plain(known), **change}, "guidance")
        return known if known.acts else None, to_plain(known, sparse=True)

    def sampler(self, sampler: Sampler | str | None, steps: int | None) -> Sampler:
        """The sampler of a call: the one asked for, else that of the weights."""
        asked = self.metadata.default_sampler if sampler is None else sampler
        chosen: Sampler = from_plain(Sampler, asked, "sampler")  # type: ignore[type-abstract]
        return replace(chosen, steps=steps) if steps is not None else chosen

    def samples(self, images: Images, request: Request, **more: object) -> Samples:
        """Samples with a record each; `more` goes into all of them."""
        shared = {
            "guidance": request.record,
            "sampler": to_plain(request.sampler),
            "dtype": _DTYPES[request.speed.get("precision")],
            **self.encoders(),
            "weights": to_plain(self.metadata.provenance, sparse=True),
            "model": self.metadata.name,
            "device": str(self.generator.device),
            "diffzoo": __version__,
            "noise": NOISE,
            **more,
        }
        records = [
            {**shared, "seed": int(seed), **({"drawn": label} if label else {})}
            for label, seed in zip(request.labels, request.seeds, strict=True)
        ]
        for record, class_id in zip(records, request.ids, strict=bool(request.ids)):
            record["class_id"] = class_id  # several classes may have one label
        pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
        return Samples(pixels, request.labels, records, request.columns)

    def encoders(self) -> dict[str, object]:
        """Which autoencoder and text encoder took part."""
        found: dict[str, object] = {}
        if not isinstance(self.generator.autoencoder, Identity):
            found["autoencoder"] = self.generator.autoencoder.id
        if self.generator.text_encoder is not None:
            spec = self.metadata.text_encoder
            known = to_plain(spec, sparse=True) if spec else {"class": type(self.generator.text_encoder).__name__}
            recorded = read_record(encoder_record(str(known.get("source", ""))))
            found["text_encoder"] = {**known, "revision": known.get("revision") or recorded.get("revision")}
        return found
