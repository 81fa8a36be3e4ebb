"""What is known about a set of weights besides the weights: the content of `config.json`.

family        class of the network                     config     its config, as data
name          registry name it was built from          process    `diffzoo.process.to_config`
class_names   in order of class index                  guidance   {formula, scale}, perhaps {interval, decay}
sampler       default sampler, as data                 autoencoder, text_encoder   frozen companions
settings      ways to draw, by name (`settings.py`)
adapter       of low-rank adapters: what they belong to (`adapters.py`)
licence       of the weights                           provenance where they come from
version       of diffzoo that wrote it
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args

from diffzoo import sampling
from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config, Network
from diffzoo.models.registry import Kind, ModelEntry, config_from_dict, config_to_dict, entry, list_models
from diffzoo.process import GaussianProcess, from_config, to_config
from diffzoo.sampling import Sampler
from diffzoo.sampling.guidance import Formula, GuidanceSchedule

__all__ = ["FORMULAS", "Metadata", "class_list", "guidance_from", "metadata_of", "registered_metadata", "sampler_from"]

# how guidance is written, and the short name of `diffzoo.sampling.guidance`
FORMULAS: dict[str, Formula] = {"cond + s * (cond - uncond)": "cond", "uncond + s * (cond - uncond)": "uncond"}
CLASS_LISTS = ("imagenet-1k",)  # public lists of class names, known by their own


@dataclass(frozen=True)
class Metadata:
    """The facts above; `class_names` is a tuple, or the name of a public list such as "imagenet-1k"."""

    family: str
    config: dict[str, Any]
    name: str | None = None
    process: dict[str, Any] | None = None
    class_names: tuple[str, ...] | str = ()
    guidance: dict[str, Any] | None = None
    sampler: dict[str, Any] | None = None
    autoencoder: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    licence: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    def network_class(self) -> type[Network]:
        """The class of the network.

        Raises:
            UserError: if no installed family has this name.
        """
        return self._entry().network

    @property
    def kind(self) -> Kind:
        """What the network is: "denoiser", or "classifier"."""
        return self._entry().kind

    def _entry(self) -> ModelEntry:
        entries = [entry(name) for kind in get_args(Kind) for name in list_models(kind=kind)]
        family = [e for e in entries if e.network.__name__ == self.family]
        if not family:
            known = {e.network.__name__ for e in entries}
            raise UserError(
                f"the weights belong to a network of family {self.family!r}, which this version of diffzoo does not "
                f"have{did_you_mean(self.family, known)}"
            )
        return next((e for e in family if e.name == self.name), family[0])

    def build_config(self) -> Config:
        """The network's config."""
        config: Config = config_from_dict(type(self._entry().config), self.config)
        return config

    def build_process(self) -> GaussianProcess:
        """The process as an object.

        Raises:
            UserError: if it is not known.
        """
        if self.process is None:
            raise UserError(
                "these weights do not say which noise process they were trained with, so they cannot be sampled from"
            )
        process: GaussianProcess = from_config(self.process, default="GaussianProcess")
        return process

    def build_sampler(self) -> Sampler:
        """The default sampler: the one recorded, or DDIM with 50 steps."""
        return sampler_from(self.sampler or {"class": "DDIM", "steps": 50})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, without what is not known."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["class_names"] = list(self.class_names) if isinstance(self.class_names, tuple) else self.class_names
        return {name: value for name, value in values.items() if value not in (None, [], {}, "")}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "Metadata":
        """The inverse of `to_dict`; unknown fields of later versions are ignored.

        Raises:
            UserError: if `family` or `config` is missing; names `where`.
        """
        if not isinstance(data, dict) or not isinstance(data.get("family"), str) or "config" not in data:
            raise UserError(f"{where} does not say which network its weights belong to: expected 'family' and 'config'")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        names = values.get("class_names", ())
        values["class_names"] = names if isinstance(names, str) else tuple(names)
        return cls(**values)


def metadata_of(network: Network, process: GaussianProcess | None = None, **more: Any) -> Metadata:
    """The facts of a network in memory; `more` are further fields of `Metadata`."""
    from diffzoo import __version__

    return Metadata(
        family=type(network).__name__,
        config=config_to_dict(network.config),
        process=to_config(process) if process is not None else None,
        version=__version__,
        **more,
    )


def sampler_from(data: Any) -> Any:
    """A sampler, or one of its parts, from plain data: {class, field: value, ...}, or a class name alone.

    Raises:
        UserError: for an unknown class or field, naming the nearest.
    """
    if isinstance(data, str) and isinstance(getattr(sampling, data, None), type):
        data = {"class": data}
    if not isinstance(data, dict):
        return data
    values = dict(data)
    name = values.pop("class", None)
    cls = getattr(sampling, str(name), None)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        known = [n for n in sampling.__all__ if is_dataclass(getattr(sampling, n))]
        raise UserError(f"unknown sampler or grid {name!r}{did_you_mean(str(name), known)}")
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"{name} has no field {key!r}{did_you_mean(key, known)}")
    return cls(**{key: sampler_from(value) for key, value in values.items()})


GUIDANCE_SCHEDULES = {
    "interval": "Interval",
    "decay": "PowerCosine",
}  # fields of guidance that are objects, and their usual class


def guidance_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `diffzoo.sampling.ClassifierFree` from plain data.

    Args:
        data: {formula, scale}, the formula in words or its short name; perhaps {interval: {low, high, unit}} and
            {decay: {power}}, DiMR's power cosine.

    Raises:
        UserError: for an unknown field, formula or class, naming the nearest.
    """
    values = dict(data)
    accepted = ["formula", "scale", *GUIDANCE_SCHEDULES]
    for key in values:
        if key not in accepted:
            raise UserError(f"guidance has no argument {key!r}{did_you_mean(key, accepted)}")
    formula = values.get("formula", "uncond")
    if formula not in (*FORMULAS, *FORMULAS.values()):
        raise UserError(f"expected the formula of guidance to be one of {list(FORMULAS)}, got {formula!r}")
    values["formula"] = FORMULAS.get(formula, formula)
    for key, usual in GUIDANCE_SCHEDULES.items():
        if values.get(key) is None:
            values.pop(key, None)
            continue
        if not isinstance(values[key], Mapping):
            raise UserError(f"expected {key} of guidance to be a mapping such as that of {usual}, got {values[key]!r}")
        values[key] = sampler_from({"class": usual, **values[key]})
        if not isinstance(values[key], GuidanceSchedule):
            raise UserError(
                f"{type(values[key]).__name__} says nothing about when guidance acts: use {usual} for {key}"
            )
    return values


def registered_metadata(name: str) -> Metadata:
    """The facts of a registered name, for weights that come without any: which network, and no process."""
    found = entry(name)
    return Metadata(family=found.network.__name__, config=config_to_dict(found.config), name=name)


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
