"""From a name to pictures: everything a set of weights needs to draw, behind one call.

pipe = diffzoo.pipeline("dimr_xl_256")
pictures = pipe(["golden retriever", 207], seeds=range(8), guidance=0.4, steps=50)
pictures.save_png("pictures")
"""

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffzoo import __version__, sampling
from diffzoo.encoders import text
from diffzoo.encoders.autoencoder import Autoencoder, Identity, KLAutoencoder
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError, did_you_mean
from diffzoo.images import make_grid, save_png, to_float, to_uint8
from diffzoo.pins import encoder_record, read_record
from diffzoo.process import to_config
from diffzoo.sampling import (
    ClassifierFree,
    ClassifierGuidance,
    Denoise,
    Denoiser,
    Sampler,
    Trajectory,
    sample,
    upsample,
)
from diffzoo.sampling.loop import Precision
from diffzoo.typing import Condition
from diffzoo.zoo.export import DTYPES
from diffzoo.zoo.loading import Loaded, load_any
from diffzoo.zoo.metadata import class_list, guidance_from, sampler_from
from diffzoo.zoo.settings import published_scale, setting_of

__all__ = ["Pictures", "Pipeline", "device_of", "pipeline"]


def device_of(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None = a GPU if there is one.

    Raises:
        UserError: for a name that is none, and for a GPU that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device {device}: {torch.cuda.device_count()} GPUs were found; cpu works anywhere")
    return device


class Pictures:
    """Pictures and how they were made.

    pixels:  uint8 `(n, h, w, 3)`, a NumPy array.
    labels:  what each shows, for people.
    records: how each was made, as plain data.
    columns: pictures per row of `grid`.
    """

    def __init__(self, pixels: np.ndarray, labels: list[str], records: list[dict[str, Any]], columns: int):
        self.pixels, self.labels, self.records, self.columns = pixels, labels, records, columns

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels.astype(dtype) if dtype is not None else self.pixels

    def pil(self) -> list[Any]:
        """The pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(p) for p in self.pixels]

    def save_png(self, folder: str | Path) -> list[Path]:
        """One PNG per picture, its record in the metadata field "diffzoo" as JSON; returns the paths.

        Files are called by label and seed, and numbered where these are alike.
        """
        paths: list[Path] = []
        taken: set[str] = set()
        for image, label, record in zip(self._planar(), self.labels, self.records, strict=True):
            stem = "_".join(part for part in (_file_part(label), f"seed{record['seed']}") if part)
            numbered = (f"{stem}_{i}" for i in itertools.count(2))
            name = next(n for n in itertools.chain([stem], numbered) if n not in taken)
            taken.add(name)
            paths.append(save_png(image, Path(folder) / f"{name}.png", {"diffzoo": json.dumps(record, sort_keys=True)}))
        return paths

    def save_grid(self, path: str | Path) -> Path:
        """All pictures in one PNG, a row per class, with the records of all in its metadata."""
        text = {"diffzoo": json.dumps(self.records, sort_keys=True)}
        return save_png(make_grid(self._planar(), self.columns), path, text)

    def _planar(self) -> Tensor:
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)

    def __repr__(self) -> str:
        n, h, w, _ = self.pixels.shape
        return f"Pictures({n} of {h}x{w})"


def _samplers() -> list[str]:
    found = [(n, getattr(sampling, n)) for n in sampling.__all__]
    return [n for n, v in found if isinstance(v, type) and issubclass(v, Sampler) and v is not Sampler]


def _dtype(precision: Precision | None) -> str:
    """What the network computed in, for records."""
    return str(DTYPES[precision or "fp32"]).removeprefix("torch.")


def _file_part(label: str) -> str:
    """The letters and digits of a label, of any script; a long one is cut and ends in a hash of the whole."""
    text = unicodedata.normalize("NFC", label.casefold())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    part = "_".join(word for word in words if any(map(str.isalnum, word)))
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # a locale without these letters
        part = part.encode("ascii", "ignore").decode().strip("_")
    if len(part) <= 60 and len(part.encode()) <= 180:  # a file system takes 255 bytes
        return part
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{part[:51].encode()[:171].decode(errors='ignore').rstrip('_')}_{digest}"


class Pipeline:
    """From classes or captions to pictures: network, process, guidance, sampler, autoencoder, text encoder.

    Args:
        loaded: from `load_any`.
        device: where to compute; default: a GPU if there is one.
        autoencoder: in place of the one that the weights were trained with.
        text_encoder: likewise.
        classifier: a noise-aware classifier of the same resolution, which then does the guidance.
        base: for an upsampler: makes the pipeline that draws the small pictures, when first needed.
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
        if loaded.metadata.kind != "denoiser":
            raise UserError(
                f"{loaded.metadata.name or loaded.metadata.family} is a classifier and draws nothing: guide "
                f"a model of its "
                "resolution with it, pipeline(MODEL, classifier=...) or diffzoo sample MODEL --classifier ..."
            )
        self.metadata, self.process = loaded.metadata, loaded.process
        self.device = device_of(device)
        self.network = loaded.network.eval().to(self.device)
        self.denoiser = Denoiser(self.network, self.process)
        self._classifier = self._fitting(classifier) if classifier is not None else None
        self._base, self.scale = base, scale
        self._autoencoder, self._text_encoder = autoencoder, text_encoder
        self._names: tuple[str, ...] | None = None

    # -- companions

    def _fitting(self, classifier: Loaded) -> Loaded:
        """A classifier for this network's noisy images, on the device."""
        ours, theirs = self.network.config, classifier.network.config
        if classifier.metadata.kind != "classifier":
            raise UserError(f"{classifier.metadata.name} is no classifier: guide with one, such as adm_classifier_64")
        if (ours.image_size, ours.in_channels) != (theirs.image_size, theirs.in_channels):
            raise UserError(
                f"the classifier reads images of {theirs.image_size} px, this model draws {ours.image_size} px: "
                f"use the classifier for {ours.image_size} px"
            )
        if classifier.metadata.process is not None and classifier.process.schedule != self.process.schedule:
            raise UserError(
                f"{classifier.metadata.name} was trained on another noise schedule than {self.metadata.name}: use the "
                "classifier that was made for this model"
            )
        classifier.network.eval().requires_grad_(False).to(self.device)
        return classifier

    @cached_property
    def base(self) -> "Pipeline | None":
        """For an upsampler that knows one: what draws the small pictures, loaded on first use."""
        return self._base() if self._base is not None else None

    @property
    def classifier(self) -> Any:
        """The network of the classifier that guides, or None."""
        return self._classifier.network if self._classifier is not None else None

    def guide_with(self, classifier: Loaded) -> None:
        """Let a classifier of the same resolution do the guidance from now on."""
        self._classifier = self._fitting(classifier)

    @property
    def class_count(self) -> int:
        """How many classes there are to choose from: the network's, or those that a classifier guides towards."""
        guide = self._classifier.network.config.num_classes if self._classifier else 0
        return self.network.config.num_classes or guide

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, built on first use; the identity in pixel space."""
        if self._autoencoder is None:
            known = self.metadata.autoencoder
            self._autoencoder = KLAutoencoder(**known) if known else Identity()
            self._autoencoder.to(self.device)
        return self._autoencoder

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, built on first use."""
        if self._text_encoder is None:
            values = dict(self.metadata.text_encoder or {})
            cls = getattr(text, str(values.pop("class", "")), None)
            if cls is None:
                raise UserError("these weights read captions but do not say through which text encoder: pass one")
            self._text_encoder = cls(**values).to(self.device)
        return self._text_encoder

    def _companions(self) -> dict[str, Any]:
        """Which autoencoder and text encoder took part, for the records of pictures."""
        found: dict[str, Any] = {}
        if not isinstance(self.autoencoder, Identity):
            found["autoencoder"] = self.autoencoder.id
        if self._text_encoder is not None:
            known = dict(self.metadata.text_encoder or {"class": type(self._text_encoder).__name__})
            revision = known.get("revision") or read_record(encoder_record(str(known.get("source", "")))).get(
                "revision"
            )
            found["text_encoder"] = {**known, "revision": revision}
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty if they are not known."""
        if self._names is None:
            guide = self._classifier.metadata.class_names if self._classifier else ()
            self._names = class_list(self.metadata.class_names or guide)
        return self._names

    # -- conditions

    @property
    def condition_kind(self) -> str:
        """What it draws from: "class", "caption", "picture" (upsamplers) or "nothing"."""
        config: Any = self.network.config
        if getattr(config, "upsampler", False):
            return "picture"
        return "caption" if getattr(config, "text_width", 0) else ("class" if self.class_count else "nothing")

    def class_id(self, wanted: str | int) -> int:
        """The index of a class, by index or name; an ImageNet class may be called by any of its names.

        Raises:
            UserError: for an index out of range, an unknown name, naming the nearest, or a name of several classes,
                naming their numbers.
        """
        count = self.class_count
        if not isinstance(wanted, str) or wanted.lstrip("-").isdigit():
            if not 0 <= int(wanted) < count:
                raise UserError(f"class {wanted} is out of range: this model has classes 0 to {count - 1}")
            return int(wanted)
        if not self.class_names:
            raise UserError(
                f"the classes of this model have no names: use a number from 0 to {count - 1}, not {wanted!r}"
            )
        called = {i: {name, *name.split(", ")} for i, name in enumerate(self.class_names)}
        found = [i for i, names in called.items() if wanted.casefold() in {name.casefold() for name in names}]
        if not found:
            raise UserError(f"no class is called {wanted!r}{did_you_mean(wanted, set().union(*called.values()))}")
        if len(found) > 1:  # two ImageNet classes are a crane
            numbers = " and ".join(f"{i} ({self.class_names[i]})" for i in found)
            raise UserError(
                f"{wanted!r} is the name of several classes, {numbers}: give the number of the one you mean"
            )
        return found[0]

    def _label(self, index: int) -> str:
        return self.class_names[index].split(", ")[0] if self.class_names else f"class {index}"

    def _condition(self, items: Sequence[str | int] | None) -> tuple[list[str], Condition | None]:
        """A label and a row of conditions for each item."""
        if self.condition_kind == "picture":
            # __call__ has drawn the small pictures where there is a base
            raise UserError(
                "this model enlarges pictures: it needs low-resolution images, not classes alone; draw them with a "
                "smaller model and pass them to `upsample`"
            )
        if self.condition_kind == "nothing":
            if items:
                raise UserError("this model is unconditional: leave out the classes")
            return [""], None
        if not items:
            raise UserError(f"this model draws from a {self.condition_kind}: say which, for example [0, 1]")
        if self.condition_kind == "caption":
            captions = [str(item) for item in items]
            embedded, mask = self.text_encoder.encode(captions)
            return captions, Condition(text=embedded, text_mask=mask)
        ids = [self.class_id(item) for item in items]
        return [self._label(i) for i in ids], Condition(label=torch.tensor(ids))

    # -- drawing

    def _denoise(self, guidance: float | Mapping[str, Any] | None) -> tuple[Denoise, dict[str, Any] | None]:
        """The denoiser, guided if asked, and the record of the guidance."""
        if self._classifier is not None:
            if isinstance(guidance, Mapping):
                raise UserError("a classifier does the guidance: give its scale as a number")
            scale = (1.0 if self.scale is None else self.scale) if guidance is None else float(guidance)
            guided = ClassifierGuidance(
                self.denoiser, self._classifier.network, scale, conditional=self.network.config.num_classes > 0
            )
            by = self._classifier.metadata.name
            return guided, {"formula": "score + s * grad log p(class)", "scale": scale, "classifier": by}
        known = self.metadata.guidance or {"formula": "uncond + s * (cond - uncond)", "scale": 1.0}
        if guidance is not None:
            known = {**known, **(guidance if isinstance(guidance, Mapping) else {"scale": guidance})}
        values = guidance_from(known)
        scale = values["scale"] = float(values["scale"])
        if self.condition_kind == "nothing":
            if guidance is not None:
                raise UserError("this model is unconditional: guidance has nothing to act on; leave it out")
            return self.denoiser, None
        record = {**{k: v for k, v in known.items() if v is not None}, "scale": scale}
        if scale == (1 if values["formula"] == "uncond" else 0):
            return self.denoiser, record
        null = None
        if self.condition_kind == "caption":
            embedded, mask = self.text_encoder.null(1)
            null = Condition(text=embedded, text_mask=mask)
        return ClassifierFree(self.denoiser, **values, null=null), record

    def _sampler(self, sampler: Sampler | str | None, steps: int | None) -> Sampler:
        chosen = self.metadata.build_sampler() if sampler is None else sampler_from(sampler)
        if not isinstance(chosen, Sampler):
            raise UserError(f"expected a sampler, got {sampler!r}{did_you_mean(str(sampler), _samplers())}")
        return replace(chosen, steps=steps) if steps is not None else chosen

    def __call__(
        self,
        classes: Sequence[str | int] | str | int | None = None,
        seeds: Sequence[int] = range(4),
        *,
        guidance: float | Mapping[str, Any] | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        batch_size: int | None = 16,
        progress: bool = False,
        precision: Precision | None = None,
        compile: bool = False,
        trajectory: Trajectory | None = None,
    ) -> Pictures:
        """Draw every class with every seed, class by class.

        Args:
            classes: names, indices or captions; None for unconditional models.
            seeds: one picture per class and seed; a seed gives the same picture in any batch.
            guidance: strength, in the formula that the weights were published with (`pipe.metadata.guidance`); without
                one, s in `uncond + s (cond - uncond)`. Or some of {formula, scale, interval, decay} as a mapping
                (`diffzoo.zoo.metadata.guidance_from`). Default: as published, else none. With a classifier: its scale,
                by default 1.
            steps: of the sampler; of both samplers where an upsampler has a base.
            sampler: a sampler, or the name of its class. Default: the published one, else DDIM.
            batch_size: pictures at a time.
            progress: show a bar.
            precision: "bf16" or "fp16" for the network.
            compile: compile the network first: worth it for many pictures.
            trajectory: collects what the network believed at each step, for a GIF or a contact sheet; with a
                base, what that believed.

        Raises:
            UserError: for classes or seeds that the model cannot draw.
        """
        items = [classes] if isinstance(classes, str | int) else (list(classes) if classes is not None else None)
        seeds = [int(s) for s in seeds]
        if not seeds:
            raise UserError("there are no seeds: give at least one, for example range(8)")
        if self.base is not None:
            small = self.base(
                items, seeds, steps=steps, batch_size=batch_size, progress=progress, precision=precision,
                compile=compile, trajectory=trajectory,
            )  # fmt: skip
            each = [item for item in items or () for _ in seeds]
            again = [record["seed"] for record in small.records]
            few = max(1, batch_size // 4) if batch_size else None  # its pictures are sixteen times as large
            return self.upsample(
                small, each, again, guidance=guidance, steps=steps, sampler=sampler, batch_size=few,
                progress=progress, precision=precision,
            )  # fmt: skip
        labels, rows = self._condition(items)
        denoise, guided = self._denoise(guidance)
        solver = self._sampler(sampler, steps)
        config = self.network.config
        _ = self.autoencoder.ratio  # loads it: a missing package or a failed download is said before the steps
        if trajectory is not None and trajectory.decode is None and self.metadata.autoencoder is not None:
            trajectory.decode = self.autoencoder.decode
        latents = sample(
            denoise,
            solver,
            (config.in_channels, config.image_size, config.image_size),
            seeds * len(labels),
            rows[torch.arange(len(labels)).repeat_interleave(len(seeds))] if rows is not None else None,
            device=self.device,
            batch_size=batch_size,
            progress=progress,
            precision=precision,
            compile=compile,
            trajectory=trajectory,
        )
        every = [label for label in labels for _ in seeds]
        ids = rows.label.repeat_interleave(len(seeds)).tolist() if rows is not None and rows.label is not None else []
        made = {"guidance": guided, "sampler": to_config(solver), "dtype": _dtype(precision)}
        return self._pictures(latents, every, ids, seeds * len(labels), made, len(seeds))

    def upsample(
        self,
        pictures: Pictures | np.ndarray,
        classes: Sequence[str | int] | None = None,
        seeds: Sequence[int] = (),
        *,
        guidance: float | Mapping[str, Any] | None = None,
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        batch_size: int | None = 4,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> Pictures:
        """Draw pictures like these, larger; only for upsamplers.

        Args:
            pictures: uint8 `(n, h, w, 3)`.
            classes: name or index of the class of each picture, for class-conditional upsamplers.
            seeds: one per picture.
            guidance: scale of the classifier, if the pipeline has one.
            steps, sampler, batch_size, progress, precision: as for drawing.
        """
        config: Any = self.network.config
        if not getattr(config, "upsampler", False):
            raise UserError("this model does not enlarge pictures: use an upsampler, such as adm_64_to_256")
        pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
        ids = [self.class_id(item) for item in classes or ()]
        n = len(pixels)
        if len(seeds) != n or (self.class_count and len(ids) != n):
            raise UserError(f"expected {n} seeds and classes, one per picture, got {len(seeds)} and {len(ids)}")
        denoise, guided = self._denoise(guidance) if self._classifier else (self.denoiser, None)
        solver = self._sampler(sampler, steps)
        images = upsample(
            denoise,
            solver,
            to_float(pixels),
            (config.in_channels, config.image_size, config.image_size),
            seeds,
            torch.tensor(ids) if ids else None,
            device=self.device,
            batch_size=batch_size,
            progress=progress,
            precision=precision,
        )
        labels = [self._label(i) for i in ids] or [""] * len(pixels)
        columns = pictures.columns if isinstance(pictures, Pictures) else len(pixels)
        made: dict[str, Any] = {"guidance": guided, "sampler": to_config(solver), "dtype": _dtype(precision)}
        drawn = self._pictures(images, labels, ids, seeds, made, columns)
        if isinstance(pictures, Pictures):
            drawn.records = [{**r, "enlarged": small} for r, small in zip(drawn.records, pictures.records, strict=True)]
        return drawn

    def _pictures(
        self,
        latents: Tensor,
        labels: list[str],
        ids: list[int],
        seeds: Sequence[int],
        made: dict[str, Any],
        columns: int,
    ) -> Pictures:
        """Decoded pictures with a record each; `ids` are their classes, empty if they were drawn from none."""
        pixels = to_uint8(self.autoencoder.decode(latents)).permute(0, 2, 3, 1).cpu().contiguous().numpy()
        made = {
            **made,
            **self._companions(),
            "weights": self.metadata.provenance,
            "model": self.metadata.name,
            "device": str(self.device),
            "diffzoo": __version__,
        }
        records = [
            {**made, "seed": int(seed), **({"drawn": label} if label else {})}
            for label, seed in zip(labels, seeds, strict=True)
        ]
        for record, class_id in zip(records, ids, strict=bool(ids)):
            record["class_id"] = class_id  # several classes may have one label
        return Pictures(pixels, labels, records, columns)

    def __repr__(self) -> str:
        name = self.metadata.name or self.metadata.family
        return f"Pipeline({name}, draws from a {self.condition_kind}, on {self.device})"


def pipeline(
    source: str | Path,
    device: str | torch.device | None = None,
    *,
    autoencoder: Autoencoder | None = None,
    text_encoder: TextEncoder | None = None,
    classifier: str | Path | None = None,
    setting: str | None = None,
    prefer: str = "average",
) -> Pipeline:
    """Everything from a name to pictures: `pipeline("dimr_xl_256")(["golden retriever", 207], seeds=range(8))`.

    Args:
        source: a published name, a run directory, a file or a Hub repository; see `diffzoo.zoo.locate`.
        device: where to compute; default: a GPU if there is one.
        autoencoder, text_encoder: in place of those that the weights were trained with.
        classifier: weights of a noise-aware classifier, which then does the guidance, such as "adm_classifier_256".
        setting: a published way to draw, such as "guided" (`pipe.metadata.settings`): sampler, classifier and its
            scale, and what an upsampler enlarges. Upsamplers begin with their first.
        prefer: which weights of a checkpoint: "average", "raw" or the label of an average.

    Raises:
        UserError: for weights that cannot be had, or that do not say how to sample from them.
    """
    loaded = load_any(source, prefer=prefer)
    chosen = setting_of(loaded.metadata, setting)
    if chosen.sampler is not None:
        loaded = replace(loaded, metadata=replace(loaded.metadata, sampler=dict(chosen.sampler)))
    base = partial(pipeline, chosen.base, device, setting=chosen.base_setting) if chosen.base is not None else None
    by = classifier if classifier is not None else chosen.classifier
    guide = load_any(by) if by is not None else None
    scale = chosen.scale if classifier is None else published_scale(loaded.metadata, guide.metadata if guide else None)
    return Pipeline(loaded, device, autoencoder, text_encoder, guide, base, scale)
