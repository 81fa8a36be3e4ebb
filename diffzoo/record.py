"""Frozen dataclasses as plain JSON data and back, driven by their annotations.

    to_plain(Shifted(Cosine(), 64, 256))
    {"class": "diffzoo.process.Shifted", "base": {"class": "diffzoo.process.Cosine", ...}, "from_resolution": 64, ...}

A *part* is a field annotated with an abstract base: a schedule, a sampler, a grid. It is stored with its class as
`module.Class`, so that a class of a user's own module is found again wherever that module can be imported. A name
without a module ("Cosine") means a class of this package or of a module that is imported already. Names of earlier
versions are understood (`RENAMED`). Reading a file runs nothing but the import of the modules that it names, and
accepts dataclasses that are subclasses of the annotated base.

A field may say more in its metadata: `key`, its name in the data; `usual`, the class of a mapping without a class;
`sparse`, that it is left out where it is None or empty, so that records keep the hash they had before it existed.
"""

import hashlib
import inspect
import json
import math
import sys
import types
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from diffzoo.errors import UserError, did_you_mean, nearest

__all__ = ["canonical_json", "class_name", "differences", "digest", "from_plain", "to_plain"]

T = TypeVar("T")

# names that earlier versions wrote, for fields, classes and values
RENAMED = {
    "reads": "noise_conditioning",
    "ReadsLogSNR": "LogSNRConditioning",
    "ReadsTime": "TimeConditioning",
    "base_setting": "base_preset",
    "WeightAverages": "EMA",
    "Checkpoints": "Checkpointing",
    "LossGuard": "GradientGuard",
    "Throughput": "TrainingLog",
    "HubImages": "HFDataset",
    "cond + s * (cond - uncond)": "cond",
    "uncond + s * (cond - uncond)": "uncond",
}


# -- writing


def to_plain(value: object, *, sparse: bool = False) -> Any:
    """A dataclass, or a container of such, as JSON-ready data.

    Args:
        value: of dataclasses, classes, tuples, mappings and scalars.
        sparse: leave out the fields that are None or empty, as they are by default.
    """
    return _plain(value, type(value), sparse)


def _plain(value: object, hint: object, sparse: bool) -> object:
    if isinstance(value, type):
        return class_name(value)
    if is_dataclass(value):
        cls: type = type(value)
        # a reader that knows the annotation alone builds objects of just this class
        known = ABC not in inspect.getmro(cls) and (hint is Any or cls in (hint, *get_args(hint)))
        hints, result = _hints(cls), dict[str, object]({} if known else {"class": class_name(cls)})
        for f in fields(value):
            held = getattr(value, f.name)
            if not ((sparse or f.metadata.get("sparse")) and _is_absent(held, f)):
                result[_key(f)] = _plain(held, hints[f.name], sparse)
        return result
    arguments = get_args(hint)
    if isinstance(value, Mapping):
        each = arguments[1] if len(arguments) == 2 else Any
        return {str(key): _plain(held, each, sparse) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held, _element(hint, i), sparse) for i, held in enumerate(value)]
    if type(value) is int and float in (hint, *arguments) and int not in arguments:
        return float(value)  # equal objects give equal text
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # JSON knows no infinity


def _element(hint: object, index: int) -> object:
    """The annotation of an element of a list or tuple; Any where the annotation does not say."""
    for kind in (hint, *get_args(hint)):
        arguments = get_args(kind)
        if get_origin(kind) in (list, tuple) and arguments:
            return arguments[0] if arguments[-1] is Ellipsis or get_origin(kind) is list else arguments[index]
    return Any


def _is_absent(value: object, field: Field) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return (value is None or value in ((), {}, [], "")) and value == default


def class_name(cls: type) -> str:
    """A class as `module.Class`; one of this package by the package that exports it, where it stays when files move."""
    package = ".".join(cls.__module__.split(".")[:2])
    if package.startswith("diffzoo.") and vars(sys.modules[package]).get(cls.__name__) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


# -- reading


def from_plain(cls: type[T], data: object, where: str = "") -> T:
    """The object of `cls` that plain data describe; the inverse of `to_plain`.

    Args:
        cls: a dataclass, or an abstract base, for which the data name a subclass.
        data: JSON-ready; an object of `cls` passes as it is.
        where: a name for messages, such as a file.

    Raises:
        UserError: `path.to.field: expected …, got …`, for a field, a value or a class that does not fit.
    """
    return cast(T, _read(cls, data, where))


def _read(hint: object, data: object, where: str, usual: type | None = None) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return data
    if origin in (Union, types.UnionType):
        return _read_union(arguments, data, where, usual)
    if origin is Literal:
        value = RENAMED.get(data, data) if isinstance(data, str) else data
        return value if value in arguments else _refuse(hint, data, where, nearest(str(data), map(str, arguments)))
    if origin is type:
        return _find_class(arguments[0], data, where, built=False)
    if origin in (tuple, list):
        if not isinstance(data, list | tuple):
            _refuse(hint, data, where)
        each = arguments[:1] * len(data) if origin is list or arguments[-1] is Ellipsis else arguments
        if len(each) != len(data):
            _refuse(hint, data, where)
        return origin(_read(h, v, _at(where, i)) for i, (h, v) in enumerate(zip(each, data, strict=True)))
    plain = origin or hint
    if isinstance(plain, type) and issubclass(plain, Mapping):
        if not isinstance(data, Mapping):
            _refuse(hint, data, where)
        return {key: _read(arguments[1] if arguments else object, v, _at(where, key)) for key, v in data.items()}
    if hint in (bool, int, float, str, type(None)):
        return _read_scalar(hint, data, where)
    return _read_object(cast(type, hint), data, where, usual)


def _read_scalar(hint: type, data: object, where: str) -> object:
    if hint is float and data in ("inf", "-inf"):
        return math.inf if data == "inf" else -math.inf
    # a bool is an int for Python, never for a reader of data
    accepted = (int, float) if hint is float else hint
    if not isinstance(data, accepted) or (isinstance(data, bool) and hint is not bool):
        _refuse(hint, data, where)
    return float(data) if isinstance(data, int | float) and hint is float else data


def _read_union(hints: tuple[object, ...], data: object, where: str, usual: type | None) -> object:
    if data is None and type(None) in hints:
        return None
    problems = []
    for hint in (h for h in hints if h is not type(None)):
        try:
            return _read(hint, data, where, usual)
        except UserError as error:
            problems.append(error)
    if len(problems) == 1 and isinstance(data, Mapping | list):
        raise problems[0]
    return _refuse(Union[hints], data, where)  # noqa: UP007  built at run time


def _read_object(hint: type, data: object, where: str, usual: type | None) -> object:
    if isinstance(data, hint) or not (is_dataclass(hint) or ABC in hint.__mro__):
        return data if isinstance(data, hint) else _refuse(hint, data, where)
    if isinstance(data, str) and ABC in hint.__mro__:
        return _build(_find_class(hint, data, where), {}, where)
    if not isinstance(data, Mapping):
        return _refuse(hint, data, where)
    values = dict(data)
    cls: type = usual or hint
    if "class" in values and not (is_dataclass(hint) and any(_key(f) == "class" for f in fields(hint))):
        cls = _find_class(hint, values.pop("class"), where)
    elif inspect.isabstract(cls):
        _refuse(hint, data, where, f"; name its class: {{class: …}}{did_you_mean('', _known(hint))}")
    return _build(cls, values, where)


def _build(cls: type, data: Mapping[str, object], where: str) -> object:
    known = {_key(f): f for f in fields(cls) if f.init}
    hints = _hints(cls)
    values: dict[str, object] = {}
    for given, value in data.items():
        key = given if given in known else RENAMED.get(given, given)
        if key not in known:
            problem = f"expected fields of {cls.__name__}, got {given!r}{did_you_mean(str(given), known)}"
            raise UserError(f"{where}: {problem}" if where else problem)
        field = known[key]
        values[field.name] = _read(hints[field.name], value, _at(where, key), field.metadata.get("usual"))
    for key, field in known.items():
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{_at(where, key)}: expected {_words(hints[field.name])}, but it is missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


# -- classes


def _find_class(base: type, name: object, where: str, *, built: bool = True) -> type:
    """The class of this name; `built` says that objects of it are made from data, so it is a dataclass."""
    if isinstance(name, type) and issubclass(name, base):
        return name
    if not isinstance(name, str):
        _refuse(base, name, where)
    module, _, last = name.rpartition(".")
    last = RENAMED.get(last, last)
    found: object = None
    if not module or module.startswith("diffzoo."):  # where a file may have moved since
        found = _known(base).get(last)
    elif module:
        found = getattr(_import(module, name, where), last, None)
    if not isinstance(found, type) or not issubclass(found, base) or (built and not is_dataclass(found)):
        _refuse(base if built else type[base], name, where, did_you_mean(last, _known(base)))
    return found


def _import(module: str, name: str, where: str) -> types.ModuleType:
    place = f"{where}: " if where else ""
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{place}expected a class as module.Class, got {name!r}")
    try:
        return import_module(module)
    except Exception as error:
        raise UserError(
            f"{place}the class {name} lies in the module {module}, which cannot be imported here ({error}): put the "
            "module's folder on PYTHONPATH, or install the package that has it"
        ) from error


def _known(base: type) -> dict[str, type]:
    """The classes that may stand for a base, by name; those of this package come first."""
    if base.__module__.startswith("diffzoo."):
        import_module(".".join(base.__module__.split(".")[:2]))  # which brings the subclasses beside the base
    found = [c for c in (base, *_subclasses(base)) if not inspect.isabstract(c)]
    own = {c.__name__: c for c in found if c.__module__.startswith("diffzoo.")}
    return {c.__name__: c for c in found} | own


def kinds(base: type) -> list[str]:
    """Names of the classes that may stand for a base in plain data, sorted."""
    return sorted(_known(base))


def _subclasses(base: type) -> Iterable[type]:
    below: list[type] = type.__subclasses__(base)
    for cls in below:
        yield cls
        yield from _subclasses(cls)


@cache
def _hints(cls: type) -> dict[str, object]:
    return get_type_hints(cls)


def _key(field: Field) -> str:
    return str(field.metadata.get("key", field.name))


# -- messages


def _at(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _refuse(hint: object, data: object, where: str, hint_text: str = "") -> NoReturn:
    given = repr(data) if len(repr(data)) < 120 else f"{repr(data)[:117]}..."
    problem = f"expected {_words(hint)}, got {given}{hint_text}"
    raise UserError(f"{where}: {problem}" if where else problem)


def _words(hint: object) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(kind) for kind in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint is type(None):
        return "null"
    if hint in (bool, int, float, str):
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    plain = origin or hint
    if plain in (tuple, list):
        return "a list"
    if plain is type:
        return f"a class of {arguments[0].__name__}"
    if not isinstance(plain, type):
        return "a value"
    if issubclass(plain, Mapping):
        return "a mapping"
    return f"{'an' if plain.__name__[0] in 'AEIO' else 'a'} {plain.__name__}"


# -- canonical text


def canonical_json(data: object) -> str:
    """JSON with sorted keys and no spaces: one text for one meaning.

    Raises:
        UserError: for numbers that are not finite, which JSON does not know.
    """
    try:
        return json.dumps(to_plain(data), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        name = type(data).__name__ if is_dataclass(data) else "record"
        raise UserError(f"the {name} holds a number that is not finite: give a finite one") from error


def digest(data: object) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def differences(a: object, b: object, path: str = "") -> dict[str, tuple[object, object]]:
    """Where two pieces of JSON-ready data differ: dotted path to the pair of values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, tuple[object, object]] = {}
        for key in sorted({*a, *b}):
            found |= differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(v, Mapping) for v in a):
        found = {}
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            found |= differences(x, y, f"{path}[{i}]")
        return found
    return {} if a == b else {path: (a, b)}
