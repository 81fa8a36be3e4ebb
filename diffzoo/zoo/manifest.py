"""The manifest of published weights: a typed view of `checkpoints.yaml`, checked when it is read.

An entry belongs to one set of weights and is named `model.tag`; the first entry of a model is its default. A fact that
nobody could establish yet is written as null and explained in `unpinned`: such a revision or hash is recorded on the
first download and compared ever after (`cache.py`), never skipped in silence.
"""

import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from diffzoo import process as processes
from diffzoo import sampling
from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config
from diffzoo.models.registry import config_from_dict, entry
from diffzoo.process import GaussianProcess, from_config
from diffzoo.process.schedules import Schedule
from diffzoo.sampling import Sampler
from diffzoo.zoo.metadata import CLASS_LISTS, FORMULAS, GUIDANCE_SCHEDULES, guidance_from, sampler_from
from diffzoo.zoo.settings import Setting

__all__ = [
    "AutoencoderSpec",
    "Checkpoint",
    "Fingerprint",
    "Source",
    "checkpoint",
    "entry_config",
    "has_checkpoint",
    "list_checkpoints",
    "load_manifest",
    "manifest_path",
    "read_manifest",
]

SOURCE_KINDS = {
    "repo": ("repo", "revision", "file"),  # a file of a Hub repository
    "url": ("url",),
    "drive": ("drive",),  # the id of a file on Google Drive
    "package": ("package",),  # a path inside this package
}

TEXT_ENCODERS = ("CLIPEncoder", "T5Encoder")  # of diffzoo.encoders.text


@dataclass(frozen=True)
class Source:
    """Where the original file lies; exactly one of `repo`, `url`, `drive` and `package` is set.

    Args:
        repo: Hub repository `owner/name`, with `file` inside it and `revision`, a 40-digit commit.
        url: address of the file.
        drive: id of a publicly shared file on Google Drive.
        package: path of a file that ships inside this package.
    """

    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    url: str | None = None
    drive: str | None = None
    package: str | None = None

    @property
    def kind(self) -> str:
        """ "repo", "url", "drive" or "package"."""
        return next(kind for kind in SOURCE_KINDS if getattr(self, kind))

    @property
    def filename(self) -> str:
        """The name the file gets on disk."""
        if self.kind == "drive":
            return f"{self.drive}.pth"
        return str(self.file or self.url or self.package).rsplit("/", 1)[-1]

    def __str__(self) -> str:
        if self.repo:
            return f"{self.file} of the Hub repository {self.repo}" + (f" at {self.revision}" if self.revision else "")
        if self.drive:
            return f"Google Drive file {self.drive}"
        return str(self.url or f"{self.package} of the installed package")


@dataclass(frozen=True)
class AutoencoderSpec:
    """Which autoencoder a latent model was trained with.

    Args:
        repo: Hub repository in diffusers' layout, or a folder.
        scaling_factor: what its latents are multiplied by to have unit variance.
        revision: 40-digit commit; null = recorded on first use.
        subfolder: folder inside the repository.
    """

    repo: str
    scaling_factor: float
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class Fingerprint:
    """A network's output on the seeded input of `verify.probe`, float32 on the CPU.

    Args:
        mean, std: moments of the whole output.
        first: its first values in row-major order.
        tolerance: largest absolute error of any of these that still counts as equal.
    """

    mean: float
    std: float
    first: tuple[float, ...]
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Checkpoint:
    """One entry of the manifest.

    Args:
        name: `model.tag`.
        model: registry name.
        source: where the original file lies.
        code_licence, weights_licence: two different things.
        converter: module of `diffzoo.zoo.converters`, or "diffzoo" for files in our own layout.
        process: what the network was trained with, as plain data of `diffzoo.process.from_config`.
        sha256: hash of the original file, 64 hex digits; None = recorded on first download.
        size: bytes of the original file; None = unknown.
        unpinned: why a hash or revision is null.
        config: rewrites of the registered config that the weights need.
        guidance: {formula, scale}, perhaps {interval, decay} of `metadata.guidance_from`: the convention is a fact of
            the checkpoint.
        sampler: the paper's sampler as plain data.
        autoencoder: for latent models.
        text_encoder: for text-conditional models: {class, source, revision, ...}, the arguments of an encoder of
            `diffzoo.encoders.text`; revision null = recorded on first use.
        classes: a named list such as "imagenet-1k", or the names themselves.
        paper: {arxiv, ...}.
        settings: ways to draw, by name (`diffzoo.zoo.settings`).
        published: rows {metric, value, protocol, setting, source} as printed.
        fingerprint: recorded output; None with `fingerprint_pending` saying why.
        training: how it was trained, for weights of our own.
    """

    name: str
    model: str
    source: Source
    code_licence: str
    weights_licence: str
    converter: str
    process: Mapping[str, Any]
    sha256: str | None = None
    size: int | None = None
    unpinned: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] | None = None
    sampler: Mapping[str, Any] | None = None
    autoencoder: AutoencoderSpec | None = None
    text_encoder: Mapping[str, Any] | None = None
    classes: str | tuple[str, ...] | None = None
    paper: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: tuple[Mapping[str, Any], ...] = ()
    fingerprint: Fingerprint | None = None
    fingerprint_pending: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """The part of the name after the dot."""
        return self.name.split(".", 1)[1]

    def build_process(self) -> GaussianProcess:
        """The process as an object."""
        process: GaussianProcess = from_config(dict(self.process), default="GaussianProcess")
        return process


def entry_config(item: Checkpoint) -> Config:
    """The config of an entry's network."""
    base = entry(item.model).config
    types = get_type_hints(type(base))
    given = {k: config_from_dict(types[k], v) if k in types else v for k, v in item.config.items()}
    return base.override(**given)


# -- reading and checking

_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "source": (dict,),
    "code_licence": (str,),
    "weights_licence": (str,),
    "converter": (str,),
    "process": (dict,),
    "sha256": (str, type(None)),
    "size": (int, type(None)),
    "unpinned": (str, type(None)),
    "config": (dict,),
    "guidance": (dict, type(None)),
    "sampler": (dict, type(None)),
    "companions": (dict,),
    "class_names": (str, list, type(None)),
    "paper": (dict,),
    "settings": (dict,),
    "published": (list,),
    "fingerprint": (dict,),
    "training": (dict,),
}
_REQUIRED = ("model", "source", "sha256", "code_licence", "weights_licence", "converter", "process", "fingerprint")


@dataclass(frozen=True)
class _Place:
    """Where in which file we are, for messages."""

    file: str
    entry: str
    field: str = ""

    def at(self, name: str) -> "_Place":
        return _Place(self.file, self.entry, f"{self.field}.{name}" if self.field else name)

    def error(self, problem: str) -> UserError:
        where = f", field '{self.field}'" if self.field else ""
        return UserError(f"{self.file}: entry '{self.entry}'{where}: {problem}")

    def table(self, data: Any, known: Iterable[str], required: Iterable[str]) -> dict[str, Any]:
        """`data` as a mapping with known fields only and all required ones."""
        if not isinstance(data, dict):
            raise self.error(f"expected a mapping, got {data!r}")
        known = list(known)
        for name in data:
            if name not in known:
                raise self.at(name).error(f"unknown field{did_you_mean(str(name), known)}")
        for name in required:
            if name not in data:
                raise self.at(name).error("missing")
        return data

    def value(self, value: Any, *kinds: type) -> Any:
        """`value` if it is of one of `kinds`."""
        # bool is an int for Python, never for a reader of YAML
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise self.error(f"expected {wanted}, got {value!r}")
        if isinstance(value, str) and not value.strip():
            raise self.error(f"expected text, got {value!r}")
        return value

    def positive(self, value: Any, *kinds: type) -> Any:
        """`value` if it is a positive number of one of `kinds`, or None where that is one of them."""
        if self.value(value, *kinds) is not None and value <= 0:
            raise self.error(f"expected a positive number, got {value!r}")
        return value

    def finite(self, data: Any) -> None:
        """Raise for any number in `data` that is infinite or none."""
        if isinstance(data, float) and not math.isfinite(data):
            raise self.error(f"expected a finite number, got {data!r}")
        inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        for key, value in inside:
            self.at(str(key)).finite(value)

    def types(self, data: Mapping[str, Any], cls: type) -> None:
        """Raise for a field of `data` that is not of the type that the class declares; unknown fields pass."""
        hints = get_type_hints(cls)
        for key, value in data.items():
            if key in hints and not _fits(value, hints[key]):
                raise self.at(key).error(f"expected {_words(hints[key])}, got {value!r}")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Whatever goes wrong when an object is built from the data here is a mistake in these."""
        try:
            yield
        except Exception as error:
            raise self.error(str(error) or type(error).__name__) from error

    def digits(self, value: str | None, count: int) -> str | None:
        """`value` if it is `count` hexadecimal digits, or None."""
        if value is not None and not re.fullmatch(rf"[0-9a-f]{{{count}}}", str(value)):
            raise self.error(f"expected {count} lower-case hexadecimal digits or null, got {value!r}")
        return value


_SCALARS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), NoneType: (NoneType,)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data can be what a field of this type holds."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is tuple:
        return isinstance(value, list)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint is bool:
        return isinstance(value, bool)
    if hint in _SCALARS:
        return isinstance(value, _SCALARS[hint]) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, str | Mapping)  # a part, by name or fields


def _words(hint: Any) -> str:
    """A type for people."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint in _SCALARS or hint is bool:
        return "null" if hint is NoneType else str(hint.__name__)
    plain = get_origin(hint) or hint
    if plain is tuple:
        return "a list"
    return "a mapping" if isinstance(plain, type) and issubclass(plain, Mapping) else f"a {plain.__name__}"


def _part(data: Any, place: _Place, module: Any, build: Callable[[Any], Any], default: str = "") -> None:
    """Check an object of a process or sampler as plain data, its own parts first, so that the innermost is named."""
    cls = getattr(module, str(data.get("class", default)), None) if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(cls, type):
        place.types(data, cls)
        for key, value in data.items():
            if isinstance(value, dict):
                _part(value, place.at(str(key)), module, build)
    with place.building():
        made = build({"class": default, **data} if default and isinstance(data, dict) else data)
        if isinstance(made, Schedule):  # which computes on use
            start, end = made.logsnr(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
            if not end < start:  # as nan is not
                raise UserError(f"the log SNR must fall from data to noise, got {start:.3g} to {end:.3g}")
    hints = get_type_hints(type(made))
    for key, hint in hints.items():
        if isinstance(hint, type) and hint not in (*_SCALARS, bool) and not isinstance(getattr(made, key), hint):
            raise place.at(key).error(f"expected a {hint.__name__}, got {data[key]!r}")


def _source(data: Any, place: _Place) -> Source:
    every = sorted({name for names in SOURCE_KINDS.values() for name in names})
    table = place.table(data, every, ())
    kinds = [kind for kind in SOURCE_KINDS if kind in table]
    if len(kinds) != 1:
        raise place.error(f"expected exactly one of {', '.join(SOURCE_KINDS)}, got {kinds or sorted(table)}")
    wanted = SOURCE_KINDS[kinds[0]]
    place.table(table, wanted, wanted)
    for name, value in table.items():
        place.at(name).value(value, *((str, type(None)) if name == "revision" else (str,)))
    place.at("revision").digits(table.get("revision"), 40)
    if "repo" in table and not re.fullmatch(r"[\w.-]+/[\w.-]+", table["repo"]):
        raise place.at("repo").error(f"expected 'owner/name', got {table['repo']!r}")
    return Source(**table)


def _autoencoder(data: Any, place: _Place) -> AutoencoderSpec | None:
    if data is None:
        return None
    known = ("repo", "revision", "subfolder", "scaling_factor")
    table = place.table(data, known, ("repo", "revision", "scaling_factor"))
    place.at("revision").digits(table["revision"], 40)
    place.at("repo").value(table["repo"], str)
    place.at("subfolder").value(table.get("subfolder"), str, NoneType)
    factor = place.at("scaling_factor").positive(table["scaling_factor"], int, float)
    return AutoencoderSpec(table["repo"], float(factor), table["revision"], table.get("subfolder"))


def _text_encoder(data: Any, place: _Place) -> Mapping[str, Any] | None:
    if data is None:
        return None
    known = {"class": str, "source": str, "revision": (str, type(None)), "max_tokens": int, "keep_padding": bool}
    table = place.table(data, known, ("class", "source", "revision"))
    for name, value in table.items():
        kinds = known[name]
        place.at(name).value(value, *(kinds if isinstance(kinds, tuple) else (kinds,)))
    if table["class"] not in TEXT_ENCODERS:
        raise place.at("class").error(f"expected one of {list(TEXT_ENCODERS)}, got {table['class']!r}")
    place.at("revision").digits(table["revision"], 40)
    place.at("max_tokens").positive(table.get("max_tokens", 1), int)
    return table


def _fingerprint(data: Any, place: _Place) -> tuple[Fingerprint | None, str | None]:
    if isinstance(data, dict) and set(data) == {"pending"}:
        return None, place.at("pending").value(data["pending"], str)
    table = place.table(data, ("mean", "std", "first", "tolerance"), ("mean", "std", "first"))
    numbers = {k: place.at(k).value(table[k], int, float) for k in ("mean", "std", "tolerance") if k in table}
    place.at("tolerance").positive(numbers.get("tolerance", 1), int, float)
    first = place.at("first").value(table["first"], list)
    if not first:
        raise place.at("first").error("expected the first values of the output, got none")
    return Fingerprint(first=tuple(float(place.at("first").value(v, int, float)) for v in first), **numbers), None


def _process(data: dict[str, Any], place: _Place) -> None:
    _part(data, place, processes, from_config, "GaussianProcess")
    if not isinstance(from_config(dict(data), default="GaussianProcess"), GaussianProcess):
        raise place.error(f"expected the fields of a GaussianProcess, got {data!r}")
    if "prediction" not in data:
        raise place.at("prediction").error("missing: it is what the network was trained to predict")


def _guidance(data: dict[str, Any], place: _Place) -> None:
    table = place.table(data, ("formula", "scale", *GUIDANCE_SCHEDULES), ("formula", "scale"))
    place.at("scale").value(table["scale"], int, float)
    if place.at("formula").value(table["formula"], str) not in FORMULAS:
        raise place.at("formula").error(f"expected one of {list(FORMULAS)}, got {table['formula']!r}")
    for key in GUIDANCE_SCHEDULES.keys() & table.keys():
        fade = place.at(key).value(table[key], dict)
        _part(fade, place.at(key), sampling, sampler_from, GUIDANCE_SCHEDULES[key])
        with place.at(key).building():
            guidance_from({key: fade})


def _sampler(data: dict[str, Any], place: _Place) -> None:
    _part(data, place, sampling, sampler_from)
    if not isinstance(sampler_from(data), Sampler):
        raise place.error(f"expected a sampler, got {data!r}")


def _settings(data: dict[str, Any], place: _Place) -> dict[str, Any]:
    for name, setting in data.items():
        here = place.at(str(name))
        if isinstance(setting, dict):
            here.types(setting, Setting)
            if setting.get("sampler") is not None:
                _sampler(setting["sampler"], here.at("sampler"))
        with here.building():
            Setting.from_dict(setting)
    return data


def _config(data: dict[str, Any], model: str, place: _Place) -> None:
    try:
        base = entry(model).config
    except UserError:  # a name that is registered later, by a program of the user's
        return
    known = get_type_hints(type(base))
    place.table(data, known, ())
    place.types(data, type(base))
    with place.building():
        base.override(**{k: config_from_dict(known[k], v) for k, v in data.items()})


def _class_names(data: Any, place: _Place) -> str | tuple[str, ...] | None:
    if isinstance(data, list):
        return tuple(str(place.at(str(i)).value(name, str, int)) for i, name in enumerate(data))
    if data is not None and data not in CLASS_LISTS:
        raise place.error(f"expected a list of names, or one of {list(CLASS_LISTS)}, got {data!r}")
    return None if data is None else str(data)


@cache
def _converters() -> tuple[str, ...]:
    """The converters there are, by name."""
    return ("diffzoo", *(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent / "converters")])))


def _published(rows: list[Any], settings: Mapping[str, Any], place: _Place) -> tuple[Mapping[str, Any], ...]:
    for i, row in enumerate(rows):
        known = ("metric", "value", "protocol", "setting", "source")
        here = place.at(str(i))
        here.table(row, known, ("metric", "value", "protocol"))
        here.at("value").value(row["value"], int, float)
        for name in ("metric", "protocol"):
            here.at(name).value(row[name], str)
        for name in ("setting", "source"):
            here.at(name).value(row.get(name), str, NoneType)
        if row.get("setting") not in (None, *settings):
            raise here.at("setting").error(f"no setting {row['setting']!r}; there are {list(settings)}")
    return tuple(rows)


def _check_partners(entries: Mapping[str, Checkpoint], file: str) -> None:
    """Classifiers and bases of settings are entries themselves, and have the settings that are asked of them."""
    models = {item.model: item for item in reversed(list(entries.values()))} | dict(entries)
    for item in entries.values():
        for name, data in item.settings.items():
            setting, place = Setting.from_dict(data), _Place(file, item.name, f"settings.{name}")
            for field_ in ("classifier", "base"):
                partner = getattr(setting, field_)
                if partner is not None and partner not in models:
                    raise place.at(field_).error(f"no entry is called {partner!r}{did_you_mean(partner, models)}")
            asked = setting.base_setting
            if asked is not None and asked not in models[str(setting.base)].settings:
                raise place.at("base_setting").error(f"{setting.base} has no setting {asked!r}")


def _entry(name: str, data: Any, file: str) -> Checkpoint:
    place = _Place(file, name)
    if not re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
        raise place.error("a name is 'model.tag' in lower case, digits and underscores")
    table = place.table(data, _KINDS, _REQUIRED)
    values = {key: place.at(key).value(value, *_KINDS[key]) for key, value in table.items()}
    place.finite(values)
    if values["model"] != name.split(".", 1)[0]:
        raise place.at("model").error(f"expected the part of the name before the dot, got {values['model']!r}")
    place.at("sha256").digits(values["sha256"], 64)
    place.at("size").positive(values.get("size"), int, NoneType)
    if values["converter"] not in _converters():
        known = did_you_mean(values["converter"], _converters())
        raise place.at("converter").error(f"no converter is called {values['converter']!r}{known}")
    _config(values.get("config", {}), values["model"], place.at("config"))
    source = _source(values.pop("source"), place.at("source"))
    _process(values["process"], place.at("process"))
    companions = values.pop("companions", {})
    place.at("companions").table(companions, ("autoencoder", "text_encoder"), ())
    autoencoder = _autoencoder(companions.get("autoencoder"), place.at("companions.autoencoder"))
    text_encoder = _text_encoder(companions.get("text_encoder"), place.at("companions.text_encoder"))
    pins = {
        "sha256": values["sha256"],
        "revision": source.revision or not source.repo,
        "the autoencoder's revision": autoencoder is None or autoencoder.revision,
        "the text encoder's revision": text_encoder is None or text_encoder["revision"],
    }
    open_metadata = [name for name, known in pins.items() if not known]
    if open_metadata and not values.get("unpinned"):
        raise place.at("unpinned").error(f"missing: it must say why {' and '.join(open_metadata)} is null")
    fingerprint, pending = _fingerprint(values.pop("fingerprint"), place.at("fingerprint"))
    classes = _class_names(values.pop("class_names", None), place.at("class_names"))
    if values.get("guidance") is not None:
        _guidance(values["guidance"], place.at("guidance"))
    if values.get("sampler") is not None:
        _sampler(values["sampler"], place.at("sampler"))
    settings = _settings(values.pop("settings", {}), place.at("settings"))
    return Checkpoint(
        name=name,
        source=source,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        classes=classes,
        settings=settings,
        published=_published(values.pop("published", []), settings, place.at("published")),
        fingerprint=fingerprint,
        fingerprint_pending=pending,
        **values,
    )


def _refuse_twice(node: Any, file: str, path: tuple[str, ...]) -> None:
    """Raise for a key that stands twice in one mapping, of which YAML would take the last in silence."""
    if isinstance(node.value if node is not None else None, list):
        keys: set[str] = set()
        for i, item in enumerate(node.value):
            key, value = item if isinstance(item, tuple) else (None, item)
            name = str(i) if key is None else str(key.value)
            if name in keys:
                place = _Place(file, path[0] if path else name, ".".join([*path[1:], name] if path else []))
                raise place.error(f"stands twice, for the second time in line {key.start_mark.line + 1}")
            keys.add(name)
            _refuse_twice(value, file, (*path, name))


def read_manifest(text: str, file: str = "checkpoints.yaml") -> dict[str, Checkpoint]:
    """All entries of a manifest's text, in order.

    Raises:
        UserError: for anything wrong, naming file, entry and field.
    """
    import yaml

    # the C parser is ten times faster where it exists
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        _refuse_twice(node, file, ())
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict | None):
        raise UserError(f"{file}: expected a mapping from names to entries, got {type(data).__name__}")
    entries = {str(name): _entry(str(name), entry, file) for name, entry in (data or {}).items()}
    _check_partners(entries, file)
    return entries


def manifest_path() -> Path:
    """The manifest: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "checkpoints.yaml", package.parent / "checkpoints.yaml"):
        if path.is_file():
            return path
    raise UserError("checkpoints.yaml is missing from the installation: install diffzoo again")


@cache
def _load(path: Path) -> dict[str, Checkpoint]:
    return read_manifest(path.read_text(encoding="utf-8"), str(path))


def load_manifest(path: Path | None = None) -> dict[str, Checkpoint]:
    """The manifest at `path`, by default the package's own."""
    return _load(path or manifest_path())


def list_checkpoints(model: str | None = None) -> list[str]:
    """Names of all published weights, or of those of one model; the first is the model's default."""
    return [name for name, entry in load_manifest().items() if model in (None, entry.model)]


def has_checkpoint(name: str) -> bool:
    """Whether `name`, a model or `model.tag`, has published weights."""
    return bool(list_checkpoints(name)) or name in load_manifest()


def checkpoint(name: str) -> Checkpoint:
    """The entry of `model.tag`, or the default entry of `model`.

    Raises:
        UserError: if there is none, naming the tags or the nearest name.
    """
    entries = load_manifest()
    if name in entries:
        return entries[name]
    model = name.split(".", 1)[0]
    tags = list_checkpoints(model)
    if tags and "." not in name:
        return entries[tags[0]]
    if tags:
        raise UserError(f"{model} has no weights tagged {name.split('.', 1)[1]!r}; there are {', '.join(tags)}")
    models = {entry.model for entry in entries.values()}
    hint = did_you_mean(name, models) or "; `diffzoo.list_checkpoints()` names them all"
    raise UserError(f"no published weights for {name!r}{hint}")
