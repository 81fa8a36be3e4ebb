"""From a name to images: everything a set of weights needs to sample, behind one call.

pipe = diffzoo.pipeline("dimr_xl_256")
samples = pipe(["golden retriever", 207], seeds=range(8), guidance=0.4, steps=50)
samples.save_png("samples")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffzoo.encoders.autoencoder import Autoencoder
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError
from diffzoo.generation.classes import Classes
from diffzoo.generation.edits import Edits
from diffzoo.generation.generator import Generator, device_of
from diffzoo.generation.published import Published, Request, Speed, listed
from diffzoo.generation.samples import Samples
from diffzoo.images import to_float
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess
from diffzoo.sampling import Sampler, Trajectory
from diffzoo.sampling.loop import Precision
from diffzoo.sampling.upsample import quantise
from diffzoo.sizes import Size, as_size, sides
from diffzoo.typing import Condition, Latents
from diffzoo.zoo.building import Loaded
from diffzoo.zoo.loading import load_any

__all__ = ["Pipeline", "pipeline"]


class Pipeline(Edits):
    """A `Generator` with what is published beside the weights: class names, default sampler and guidance.

    Args:
        loaded: from `load_any`.
        device: where to compute; default: a GPU if there is one.
        autoencoder: in place of the one that the weights were trained with.
        text_encoder: likewise.
        classifier: a noise-aware classifier of the same resolution, which then does the guidance.
        base: for an upsampler: makes the pipeline that samples the small images, when first needed.
        scale: of classifier guidance where a call names none.
    """

    def __init__(
        self,
        loaded: Loaded,
        device: str | torch.device | None = None,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        classifier: Loaded | None = None,
        base: "Callable[[], Pipeline] | None" = None,
        scale: float | None = None,
    ):
        self.metadata = loaded.metadata
        self.device = device_of(device)
        self.generator = Generator.of(loaded, self.device, autoencoder, text_encoder)
        if classifier is not None:
            self.generator.guide_with(classifier)
        self.published = Published(self.generator, self.metadata, classifier, scale)
        self._base = base

    @property
    def classes(self) -> Classes:
        """The classes to choose from."""
        return self.published.classes

    @property
    def network(self) -> Network:
        """The network, in evaluation mode."""
        return self.generator.network

    @property
    def process(self) -> GaussianProcess:
        """The process it was trained with."""
        return self.generator.process

    @cached_property
    def base(self) -> "Pipeline | None":
        """For an upsampler that knows one: what samples the small images, loaded on first use."""
        return self._base() if self._base is not None else None

    def __call__(
        self,
        classes: Sequence[str | int] | str | int | None = None,
        seeds: Sequence[int] = range(4),
        *,
        guidance: float | Mapping[str, object] | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        batch_size: int | None = 16,
        progress: bool | None = None,
        precision: Precision | None = None,
        compile: bool = False,
        trajectory: Trajectory | None = None,
        start: Latents | None = None,
        size: Size | None = None,
    ) -> Samples:
        """Sample every class with every seed, class by class.

        Args:
            classes: names, indices or captions; None for unconditional models.
            seeds: one image per class and seed; a seed gives the same image in any batch.
            guidance: strength, in the formula that the weights were published with (`pipe.metadata.guidance`); without
                one, s in `uncond + s (cond - uncond)`. Or some of the fields of `diffzoo.sampling.Guidance`
                as a mapping. Default: as published, else none. With a classifier: its scale,
                by default 1.
            steps: of the sampler; of both samplers where an upsampler has a base.
            sampler: a sampler, or the name of its class. Default: the published one, else DDIM.
            batch_size: images at a time.
            progress: show a bar; None = in notebooks alone.
            precision: "bf16" or "fp16" for the network.
            compile: compile the network first: worth it for many images.
            trajectory: collects what the network believed at each step, for a GIF or a contact sheet; with a
                base, what that believed.
            start: the state to begin with, a row per image, instead of noise from the seeds; for example of `invert`.
            size: height and width in pixels, (96, 64); default: those of the model. Of an upsampler with a base: of
                the large images.

        Raises:
            UserError: for classes or seeds that the model cannot sample.
        """
        options: dict[str, Any] = {"progress": progress, "precision": precision}
        if self.base is not None:
            few_pixels = _reduced(size, self.generator.image_size, self.base.generator.image_size)
            more: dict[str, Any] = {"compile": compile, "trajectory": trajectory, "size": few_pixels}
            small = self.base(classes, seeds, steps=steps, batch_size=batch_size, **more, **options)
            each = [item for item in listed(classes) or () for _ in seeds]
            few = max(1, batch_size // 4) if batch_size else None  # its images are sixteen times as large
            again = [record["seed"] for record in small.records]
            options |= {"guidance": guidance, "steps": steps, "sampler": sampler, "batch_size": few}
            options["trajectory"] = trajectory.enlarging() if trajectory is not None else None
            return self.upsample(small, each, again, **options)
        options |= {"guidance": guidance, "steps": steps, "sampler": sampler, "batch_size": batch_size}
        request = self.published.request(classes, seeds, trajectory=trajectory, **options)
        return self.published.sample(request, size, start, compile)

    def upsample(
        self,
        images: "Samples | np.ndarray",
        classes: Sequence[str | int] | None,
        seeds: Sequence[int],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        batch_size: int | None = 4,
        progress: bool | None = None,
        precision: Precision | None = None,
        trajectory: Trajectory | None = None,
    ) -> Samples:
        """Sample images like these, larger; only for upsamplers.

        Args:
            images: uint8 `(n, h, w, 3)`; those that are not square keep their aspect.
            classes: name or index of the class of each image, for class-conditional upsamplers.
            seeds: one per image.
            guidance: scale of the classifier, if the pipeline has one.
            steps, sampler, batch_size, progress, precision, trajectory: as for sampling.
        """
        if self.generator.kind != "image":
            raise UserError("this model does not enlarge images: use an upsampler, such as adm_64_to_256")
        small = to_float(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))
        ids = [self.classes.index(item) for item in classes or ()]
        n = len(small)
        if len(seeds) != n or (self.classes.count and len(ids) != n):
            raise UserError(f"expected {n} seeds and classes, one per image, got {len(seeds)} and {len(ids)}")
        applied, record = self.published.guidance(guidance)
        labels = [self.classes.label(i) for i in ids] or [""] * n
        columns = images.columns if isinstance(images, Samples) else n
        cond = Condition(label=torch.tensor(ids) if ids else None, low_res=quantise(small))
        solver = self.published.sampler(sampler, steps)
        speed: Speed = {
            "batch_size": batch_size,
            "progress": progress,
            "precision": precision,
            "trajectory": trajectory,
        }
        request = Request(list(seeds), labels, ids, cond, solver, applied, record, columns, speed)
        h, w = small.shape[-2:]
        short = min(sides(self.generator.image_size))
        made = self.published.sample(request, as_size([h * short // min(h, w), w * short // min(h, w)]))
        if isinstance(images, Samples):
            made.records = [{**r, "enlarged": small} for r, small in zip(made.records, images.records, strict=True)]
        return made

    def __repr__(self) -> str:
        return f"Pipeline({self.metadata.title}, samples from a {self.generator.kind}, on {self.device})"


def _reduced(size: Size | None, large: Size, small: Size) -> Size | None:
    """The size of the images that are enlarged to `size`, where `small` becomes `large`."""
    if size is None:
        return None
    ratio = sides(large)[0] // sides(small)[0]
    return as_size([side // ratio for side in sides(as_size(size, "size"))])


def pipeline(
    source: str | Path,
    device: str | torch.device | None = None,
    *,
    autoencoder: Autoencoder | None = None,
    text_encoder: TextEncoder | None = None,
    classifier: str | Path | None = None,
    preset: str | None = None,
    weights: str = "ema",
) -> Pipeline:
    """Everything from a name to images: `pipeline("dimr_xl_256")(["golden retriever", 207], seeds=range(8))`.

    Args:
        source: a published name, a run directory, a file or a Hub repository; see `diffzoo.zoo.locate`.
        device: where to compute; default: a GPU if there is one.
        autoencoder, text_encoder: in place of those that the weights were trained with.
        classifier: weights of a noise-aware classifier, which then does the guidance, such as "adm_classifier_256".
        preset: a published way to sample, such as "guided" (`pipe.metadata.presets`): sampler, classifier and its
            scale, and what an upsampler enlarges. Upsamplers begin with their first.
        weights: which weights of a checkpoint: "ema", "raw" or the label of an EMA.

    Raises:
        UserError: for weights that cannot be had, or that do not say how to sample from them.
    """
    loaded = load_any(source, weights=weights)
    chosen = loaded.metadata.preset(preset)
    if chosen.sampler is not None:
        loaded = replace(loaded, metadata=replace(loaded.metadata, sampler=chosen.sampler))
    base = partial(pipeline, chosen.base, device, preset=chosen.base_preset) if chosen.base is not None else None
    guide, scale = None, chosen.scale
    if classifier is not None:
        guide = load_any(classifier)
        scale = loaded.metadata.published_scale(guide.metadata)
    elif chosen.classifier is not None:
        guide = load_any(chosen.classifier)
    return Pipeline(loaded, device, autoencoder, text_encoder, guide, base, scale)
