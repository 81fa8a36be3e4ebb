"""What is published beside weights, at work: class names, default sampler and guidance, and the record of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffzoo import __version__
from diffzoo.encoders.autoencoder import Identity
from diffzoo.errors import UserError
from diffzoo.generation.classes import Classes
from diffzoo.generation.generator import Generator
from diffzoo.generation.samples import Samples
from diffzoo.images import to_uint8
from diffzoo.pins import encoder_record, read_record
from diffzoo.record import from_plain, to_plain
from diffzoo.sampling import Guidance, Sampler
from diffzoo.typing import Condition
from diffzoo.zoo.building import Loaded
from diffzoo.zoo.metadata import Metadata, class_list

__all__ = ["Published"]


@dataclass
class Published:
    """From what people ask for to what a generator takes, with the defaults of the weights.

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
            raise UserError(f"this model samples from a {kind}: say which, for example [0, 1]")
        if kind == "caption":
            captions = [str(item) for item in items]
            return captions, [], self.generator.captions(captions)
        ids = [self.classes.index(item) for item in items]
        return [self.classes.label(i) for i in ids], ids, Condition(label=torch.tensor(ids))

    def guidance(
        self, guidance: float | Mapping[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The guidance of a call, and its record; the first is None where it changes nothing."""
        if self.classifier is not None:
            if isinstance(guidance, Mapping):
                raise UserError("a classifier does the guidance: give its scale as a number")
            scale = (1.0 if self.scale is None else self.scale) if guidance is None else float(guidance)
            by = self.classifier.metadata.name
            record = {"formula": "score + s * grad log p(class)", "scale": scale, "classifier": by}
            return {"classifier": by, "scale": scale}, record
        if self.generator.kind in ("nothing", "image"):
            if guidance is not None:
                raise UserError("this model has no condition that guidance could act on: leave the guidance out")
            return None, None
        known = self.metadata.guidance or Guidance(1.0)
        if guidance is not None:
            change = guidance if isinstance(guidance, Mapping) else {"scale": guidance}
            known = from_plain(Guidance, {**to_plain(known), **change}, "guidance")
        record = to_plain(known, sparse=True)
        return record if known.acts else None, record

    def sampler(self, sampler: Sampler | str | None, steps: int | None) -> Sampler:
        """The sampler of a call: the one asked for, else that of the weights."""
        asked = self.metadata.default_sampler if sampler is None else sampler
        chosen: Sampler = from_plain(Sampler, asked, "sampler")  # type: ignore[type-abstract]
        return replace(chosen, steps=steps) if steps is not None else chosen

    def samples(
        self,
        images: Tensor,
        labels: list[str],
        ids: list[int],
        seeds: Sequence[int],
        how: dict[str, Any],
        columns: int,
    ) -> Samples:
        """Samples with a record each; `ids` are their classes, empty if they were sampled from none."""
        shared = {
            **how,
            **self.encoders(),
            "weights": to_plain(self.metadata.provenance, sparse=True),
            "model": self.metadata.name,
            "device": str(self.generator.device),
            "diffzoo": __version__,
        }
        records = [
            {**shared, "seed": int(seed), **({"drawn": label} if label else {})}
            for label, seed in zip(labels, seeds, strict=True)
        ]
        for record, class_id in zip(records, ids, strict=bool(ids)):
            record["class_id"] = class_id  # several classes may have one label
        return Samples(to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy(), labels, records, columns)

    def encoders(self) -> dict[str, Any]:
        """Which autoencoder and text encoder took part."""
        found: dict[str, Any] = {}
        if not isinstance(self.generator.autoencoder, Identity):
            found["autoencoder"] = self.generator.autoencoder.id
        if self.generator.text_encoder is not None:
            spec = self.metadata.text_encoder
            known = to_plain(spec, sparse=True) if spec else {"class": type(self.generator.text_encoder).__name__}
            recorded = read_record(encoder_record(str(known.get("source", ""))))
            found["text_encoder"] = {**known, "revision": known.get("revision") or recorded.get("revision")}
        return found
