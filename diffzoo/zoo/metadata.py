"""The metadata of a set of weights: the one record that training writes and everything else reads.

It lies, as plain data (`diffzoo.record`), in `config.json`, in the header of a safetensors file and in the training
checkpoints; a manifest entry is one, too. Files of earlier versions are understood.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from diffzoo.encoders.autoencoder import AutoencoderSpec
from diffzoo.encoders.text import TextEncoderSpec
from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config, Network
from diffzoo.models.registry import Kind, entry, list_models
from diffzoo.process import GaussianProcess
from diffzoo.record import class_name, from_plain, to_plain
from diffzoo.sampling import DDIM, Guidance, Sampler

__all__ = [
    "Adapter",
    "Base",
    "Metadata",
    "Preset",
    "Provenance",
    "class_list",
    "foreign_modules",
    "held_metadata",
    "metadata_of",
    "read_metadata",
]

CLASS_LISTS = ("imagenet-1k",)  # public lists of class names, known by their own


@dataclass(frozen=True)
class Preset:
    """A named way to sample, as a paper did it: `diffzoo sample MODEL --preset NAME`.

    Args:
        sampler: in place of the weights' own; None = that.
        classifier: the weights of a noise-aware classifier that guides; None = none.
        scale: of classifier guidance.
        base: for an upsampler: the model whose images it enlarges.
        base_preset: how that model samples; None = plainly.
        labels: rule of the classes in an evaluation; None = balanced.
    """

    sampler: Sampler | None = None
    classifier: str | None = None
    scale: float | None = None
    base: str | None = None
    base_preset: str | None = None
    labels: Literal["uniform", "balanced"] | None = None

    def __post_init__(self) -> None:
        if (self.classifier is None) != (self.scale is None):
            raise UserError("a classifier and its scale belong together: give both or neither")
        if self.base_preset is not None and self.base is None:
            raise UserError("base_preset says how the base samples: name the base too")


@dataclass(frozen=True)
class Adapter:
    """What low-rank adapters belong to: the weights become `W + alpha / rank * B A`.

    Args:
        base: source of the weights that they were trained on.
        rank, alpha: of the product.
        base_sha256: of these weights (`diffzoo.tensors.ADAPTER_BASE`).
    """

    base: str
    rank: int
    alpha: float
    base_sha256: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where weights come from; what is not known is None.

    Args:
        pretrained: `model.tag` of the manifest.
        source: where the original file lies, in words.
        repo: Hub repository that they were loaded from.
        revision: commit of the repository.
        sha256, size: of the original file.
        file: path that they were loaded from.
        weights: which of a checkpoint's weights: the label of an EMA, "raw", or their place in the file.
        checkpoint: file name of the training checkpoint.
        global_step, epoch: of the training.
        reconstructed: of an EMA made after training: {std, updates, mismatch}.
        adapted_from: what they were before their table of classes or positions was adapted: {image_size, num_classes}.
        merged: the low-rank adapters that were merged into the base.
        base: the weights that training began from; None = from random ones, or not known.
        training: how they were trained, in words.
        notes: anything else.
    """

    pretrained: str | None = None
    source: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: str | None = None
    size: int | None = None
    file: str | None = None
    weights: str | None = None
    checkpoint: str | None = None
    global_step: int | None = None
    epoch: int | None = None
    reconstructed: dict[str, float] = field(default_factory=dict)
    adapted_from: dict[str, int] = field(default_factory=dict)
    merged: Adapter | None = None
    base: "Base | None" = None
    training: dict[str, object] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        """Which weights these are and where they come from, in one line: what a command prints that uses them."""
        hub = f"hf-hub:{self.repo}@{(self.revision or '')[:12]}" if self.repo else None
        place = self.pretrained or hub or self.file or self.checkpoint or self.source
        which = self.weights if self.weights is None or self.weights.startswith("raw") else f"EMA {self.weights}"
        step = None if self.global_step is None else f"step {self.global_step}"
        return ", ".join(part for part in (place, which, step) if part) or "of unknown origin"


@dataclass(frozen=True)
class Base:
    """The weights that a training began from.

    Args:
        source: as it was asked for, such as "dimr_xl_256.in1k"; None = weights that were not published.
        name: registered name of its network.
        licence: of these weights.
        sha256: of the file; None where `provenance` pins it.
        provenance: where they come from in turn.
    """

    source: str | None = None
    name: str | None = None
    licence: str | None = None
    sha256: str | None = None
    provenance: Provenance = Provenance()


@dataclass(frozen=True)
class Metadata:
    """What is known about a set of weights.

    Args:
        network: class of the network.
        config: its config.
        name: registered name that it was built from.
        process: that it was trained with.
        class_names: in order of the class index, or the name of a public list such as "imagenet-1k".
        guidance, sampler: how these weights are sampled by default.
        autoencoder, text_encoder: the frozen encoders.
        presets: named ways to sample.
        adapter: for low-rank adapters: what they belong to.
        licence: of the weights.
        provenance: where they come from.
        recipe: that they were trained by.
        version: of diffzoo that wrote this.
    """

    network: type[Network]
    config: Config
    name: str | None = None
    process: GaussianProcess | None = None
    class_names: tuple[str, ...] | str = ()
    guidance: Guidance | None = None
    sampler: Sampler | None = None
    autoencoder: AutoencoderSpec | None = None
    text_encoder: TextEncoderSpec | None = None
    presets: dict[str, Preset] = field(default_factory=dict)
    adapter: Adapter | None = None
    licence: str | None = None
    provenance: Provenance = Provenance()
    recipe: str | None = None
    version: str = ""

    @property
    def kind(self) -> Kind:
        """What the network is: "denoiser", or "classifier"."""
        entries = [entry(name) for kind in get_args(Kind) for name in list_models(kind=kind)]
        return next((e.kind for e in entries if e.network is self.network), "denoiser")

    @property
    def title(self) -> str:
        """The name, or else the class of the network, for messages."""
        return self.name or self.network.__name__

    @property
    def default_sampler(self) -> Sampler:
        """The sampler of these weights, or DDIM with 50 steps."""
        return self.sampler or DDIM(steps=50)

    def known_process(self) -> GaussianProcess:
        """The process.

        Raises:
            UserError: if it is not known.
        """
        if self.process is None:
            raise UserError(
                "these weights do not say which noise process they were trained with, so they cannot be sampled from"
            )
        return self.process

    def preset(self, name: str | None) -> Preset:
        """A preset by name; without a name the plain one, or an upsampler's first.

        Raises:
            UserError: if there is none of this name, listing those there are.
        """
        known = list(self.presets)
        if name is not None and name not in self.presets:
            there = f"; there are {', '.join(known)}" if known else ": these weights have none"
            raise UserError(f"no preset is called {name!r}{did_you_mean(name, known) if known else ''}{there}")
        if name is None and known and self.config.upsampler:
            name = known[0]
        return Preset() if name is None else self.presets[name]

    def published_scale(self, classifier: "Metadata") -> float | None:
        """The scale that these weights were published with under a classifier, in their own sampler."""
        ours = [p for p in self.presets.values() if p.classifier is not None and p.sampler is None]
        return next((p.scale for p in ours if str(p.classifier).split(".")[0] == classifier.name), None)

    def derived(self, **provenance: Any) -> "Metadata":
        """The same with fields of the provenance replaced."""
        return replace(self, provenance=replace(self.provenance, **provenance))

    def to_plain(self) -> dict[str, object]:
        """As JSON-ready data, without what is not known; `read_metadata` is the inverse."""
        return dict(to_plain(self, sparse=True))


def metadata_of(network: Network) -> Metadata:
    """What is known about a network in memory: that of the weights it was built with, under its present config."""
    from diffzoo import __version__

    known = network.metadata
    if isinstance(known, Metadata):
        return replace(known, config=network.config, version=__version__)
    return Metadata(type(network), network.config, version=__version__)


def class_list(names: tuple[str, ...] | str) -> tuple[str, ...]:
    """The class names themselves; named lists are read from timm, in the order of the class index.

    An ImageNet class may have several names, separated by ", ".
    """
    if isinstance(names, tuple):
        return names
    if names not in CLASS_LISTS:
        raise UserError(f"unknown list of class names {names!r}; known: {', '.join(CLASS_LISTS)}")
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo(names).label_descriptions())


# -- reading


def read_metadata(data: object, where: str) -> Metadata:
    """Metadata from plain data, of this version or an earlier one; unknown fields of later ones are ignored.

    Raises:
        UserError: if it does not say which network it is about, or for a field that does not fit; names `where`.
    """
    if not isinstance(data, dict) or "config" not in data or not ({"network", "family"} & data.keys()):
        raise UserError(f"{where} does not say which network its weights belong to: expected 'network' and 'config'")
    list_models()  # brings in the networks of other packages
    values = {_OLD_KEYS.get(key, key): value for key, value in data.items()}
    network: type[Network] = from_plain(type[Network], values["network"], f"{where}: network")  # type: ignore[arg-type]
    values["network"] = network
    if isinstance(values["config"], Mapping) and "class" not in values["config"]:
        values["config"] = {"class": class_name(get_type_hints(network)["config"]), **values["config"]}
    if isinstance(values.get("sampler"), str):
        values["sampler"] = {"class": values["sampler"]}
    if isinstance(values.get("provenance"), Mapping):
        values["provenance"] = _provenance(values["provenance"])
    known = {f.name for f in fields(Metadata)}
    return from_plain(Metadata, {k: v for k, v in values.items() if k in known and v is not None}, where)


_OLD_KEYS = {"family": "network", "settings": "presets"}


def _provenance(data: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance in today's fields: earlier versions kept a flat mapping of anything."""
    known = {f.name for f in fields(Provenance)}
    values = dict(data)
    if "source" in values and "epoch" not in values and "checkpoint" in values:
        values["pretrained"] = values.pop("checkpoint")  # a manifest entry
    if isinstance(values.get("average"), Mapping):
        values["reconstructed"] = values.pop("average")
    base = values.get("base")
    if isinstance(base, str):
        earlier = values.pop("base_provenance", None)
        unknown = base == "weights that were not published"  # said of every run, also of those from random weights
        values["base"] = {"source": None if unknown else base, "provenance": _provenance(earlier or {})}
        if unknown and not earlier:
            del values["base"]
    elif isinstance(base, Mapping) and isinstance(base.get("provenance"), Mapping):
        values["base"] = {**base, "provenance": _provenance(base["provenance"])}
    other = {k: v for k, v in values.items() if k not in known}
    values = {k: v for k, v in values.items() if k in known}
    return {**values, "notes": {**values.get("notes", {}), **other}} if other else values


def held_metadata(checkpoint: Mapping[str, object], where: str) -> Metadata | None:
    """The metadata that a training checkpoint holds, if it is one of ours; earlier versions spread it over its keys."""
    held = checkpoint.get("diffzoo")
    if isinstance(held, Mapping) and "network" in held:
        return read_metadata(held, where)
    if isinstance(held, Mapping) and isinstance(held.get("model"), Mapping):
        return read_metadata({**held, **held["model"]}, where)
    return None


# -- classes of others


def foreign_modules(metadata: Metadata) -> list[str]:
    """The modules besides this package that somebody needs who reads this metadata."""
    found = set(re.findall(r'"(?:class|network)": "([^"]+)\.[^".]+"', json.dumps(metadata.to_plain())))
    return sorted(module for module in found if module.split(".")[0] != "diffzoo")
