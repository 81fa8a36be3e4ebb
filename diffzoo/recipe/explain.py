"""Messages of jsonargparse about a recipe, as one sentence that names the nearest right key.

The original messages list every type that was tried. A reader needs to know which key is wrong and what it should be.
"""

import importlib
import inspect
import re
from abc import ABCMeta
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from diffzoo.errors import did_you_mean, nearest

if TYPE_CHECKING:
    from jsonargparse._parameter_resolvers import ParamData

__all__ = ["explain", "null_argument"]

FRONT = ("config", "run", "resume", "dry-run")  # options of `diffzoo fit` itself
PACKAGES = ("process", "sampling", "data", "encoders", "training")
REFUSED = (  # of a class, and of one that is called with more arguments later, such as an optimizer
    r"(?:Problem with given class_path '(?P<path>[\w.]+)':\s+)?Option '(?P<name>[\w.]+)' is not accepted"
    r"(?:\. Got value: Namespace\(class_path='(?P<called>[\w.]+)')?"
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list",
         "list": "a list", "dict": "a mapping"}  # fmt: skip


def explain(message: str, known: Sequence[str]) -> str:
    """One sentence for a message of jsonargparse; `known` are all keys that exist, dotted."""
    places = re.findall(r'Parser key "([\w.]+)"', message)
    where = f"{'.'.join(places)}: " if places else ""
    if argument := [*re.finditer(REFUSED, message)]:
        path, name = argument[-1]["path"] or argument[-1]["called"], argument[-1]["name"]
        hint = nearest(name, _arguments(path)) or f"; its own arguments: {', '.join(_own_arguments(path))}"
        return f"{where}{path.rsplit('.', 1)[-1]} has no argument {name!r}{hint}"
    if found := re.search(r"(?:unrecognized arguments: --|option '|Option ')([\w.\-]+)", message):
        return _unknown_key(found.group(1), [*known, *FRONT])
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found.group(1)
        folder = f"; --data.folder {name} trains on a folder of images" if places == ["data"] else ""
        return f"{where}there is no class {name!r}{did_you_mean(name, _classes(places))}{folder}"
    if found := re.search(r"Expected a path but ([A-Za-z_][\w.]*) either not accessible", message):
        missing = re.search(r"No module named '([\w.]+)'", message)
        why = f" (no module {missing.group(1)!r} here, beside the recipe or installed)" if missing else ""
        return f"{where}there is no class {found.group(1)!r}{why}{did_you_mean(found.group(1), _classes(places))}"
    if found := re.search(r"Expected an instantiatable class, but ([\w.]+) is abstract", message):
        methods = sorted(cast(ABCMeta, _found(found.group(1))).__abstractmethods__)
        return f"{where}{found.group(1)} lacks the methods {', '.join(methods)}"
    kept = re.split(r"\s+(?:Given value|Subclass types expect)", message)[0]
    kept = re.sub(r'Parser key "[\w.]+":|Problem with given class_path \'[\w.]+\':', "", kept)
    kept = re.sub(r"<class '([\w.]+)'>", r"\1", kept)
    kept = re.sub(r"Type .* expects a function or a callable class: ", "", kept)
    kept = re.sub(r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:", "", kept)
    lines = [line.strip(" -") for line in kept.splitlines() if line.strip(" -")]
    lines = [line for line in lines if line != "Expected a NoneType"]
    return where + (_kinds(message) if all(re.match("Expected", line) for line in lines) else "; ".join(lines))


def _kinds(message: str) -> str:
    """What a value had to be, and what came."""
    found = re.findall(r"Expected (?:a )?(?:<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal\[(.*)\]|([^\s<].*))", message)
    words = dict.fromkeys(KINDS.get(k, k) or literal or other for k, literal, other in found if k != "NoneType")
    came = re.search(r"(?:Got value|Given value): (?!NestedArg|Namespace)(.+)", message)
    hint = nearest(came[1], re.findall(r"'([\w-]+)'", " ".join(words))) if came else ""
    return f"expected {' or '.join(words)}" + (f", got {came[1]}{hint}" if came else "")


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """The first part of a dotted key that does not exist, and what was likely meant."""
    parts = key.split(".")
    for n in range(1, len(parts) + 1):
        head, parent = ".".join(parts[:n]), ".".join(parts[: n - 1])
        if not any(k == head or k.startswith(f"{head}.") for k in known):
            inside = [k for k in known if k.startswith(f"{parent}.")] if parent else list(known)
            siblings = {k.split(".")[n - 1] for k in inside}
            hint = did_you_mean(parts[n - 1], siblings, f"{parent}." if parent else "") or did_you_mean(head, known)
            return f"there is no key {head!r}{hint or '; --print_config prints the recipe with all that there are'}"
    return f"the key {key!r} does not belong here"


def null_argument(content: object, where: str = "") -> str:
    """The first argument of a class in a parsed recipe that is null and should not be, in a sentence; "" if none is.

    jsonargparse lets null through for arguments of classes, whatever their type.
    """
    parts = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    if isinstance(content, Mapping) and isinstance(content.get("class_path"), str):
        given = content.get("init_args") or {}
        for p in _parameters(content["class_path"]):
            if p.annotation in (int, float, bool, str) and p.default is not None and given.get(p.name, "") is None:
                return f"{where}init_args.{p.name} cannot be null: leave it out to keep {p.default!r}"
    return next(filter(None, (null_argument(part, f"{where}{key}.") for key, part in parts)), "")


def _arguments(path: str) -> Iterable[str]:
    """Arguments of a class, with those that it passes on."""
    return [parameter.name for parameter in _parameters(path)]


def _parameters(path: str) -> Sequence["ParamData"]:
    from jsonargparse._parameter_resolvers import get_signature_parameters

    made = _found(path)
    return get_signature_parameters(made, "__init__") if inspect.isclass(made) else get_signature_parameters(made)


def _own_arguments(path: str) -> Iterable[str]:
    """Arguments that a class or a function names itself."""
    stated = inspect.signature(_found(path)).parameters.values()
    return [p.name for p in stated if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _found(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _classes(places: Sequence[str]) -> Iterable[str]:
    """The public classes that recipes name at a key."""
    for package in ("data",) if places == ["data"] else PACKAGES:
        module = importlib.import_module(f"diffzoo.{package}")
        yield from (n for n in module.__all__ if inspect.isclass(getattr(module, n)))
