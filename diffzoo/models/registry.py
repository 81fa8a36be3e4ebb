"""The registry: one dict from a name to a network class and its config.

Names are `family_size_resolution`, in snake case: `simple_uvit_256`, `dimr_xl_256`. Third-party packages register
through the entry-point group `diffzoo.models`: each entry point names a module that calls `register_model`.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Literal, overload

import torch

from diffzoo.errors import UserError, check_choice, did_you_mean
from diffzoo.models.base import Config, Network

__all__ = [
    "ModelEntry",
    "build",
    "entry",
    "is_model",
    "list_models",
    "matching",
    "register_model",
    "register_variants",
]

Kind = Literal["denoiser", "classifier"]


@dataclass(frozen=True)
class ModelEntry:
    """A registered name: which class builds it, from which config, and what is known about it.

    `kind` is "denoiser", or "classifier" for a companion whose output is no image.
    """

    name: str
    network: type[Network]
    config: Config
    note: str = ""
    kind: Kind = "denoiser"


Builder = Callable[[], Network]

_REGISTRY: dict[str, ModelEntry] = {}
_plugins_loaded = False


@overload
def register_model(name: Builder, /) -> Builder: ...


@overload
def register_model(
    name: str, network: type[Network], config: Config, note: str = "", kind: Kind = "denoiser"
) -> ModelEntry: ...


def register_model(
    name: str | Builder,
    network: type[Network] | None = None,
    config: Config | None = None,
    note: str = "",
    kind: Kind = "denoiser",
) -> ModelEntry | Builder:
    """Register a network under a name; or, as a decorator, the network that a function returns, under its name.

    A decorated function is called once, without arguments and on the meta device; the class and the config of its
    network are registered, and the first line of its docstring is the note.

    Args:
        name: snake case, `family_size_resolution`; or the function.
        network: class whose constructor takes the config.
        config: of this size.
        note: one line for `describe`, for example that a size is inferred.
        kind: "denoiser", or "classifier" for a noise-aware classifier; `list_models` keeps them apart.

    Raises:
        UserError: if the name is taken, or the function returns no network with a config.
    """
    if callable(name):
        _register_built(name)
        return name
    if network is None or config is None:
        raise UserError("register_model takes a name, a network class and a config, or decorates a function")
    if name in _REGISTRY:
        raise UserError(f"a model named {name!r} is already registered: choose another name")
    _REGISTRY[name] = ModelEntry(name, network, config, note, kind)
    return _REGISTRY[name]


def _register_built(function: Builder) -> None:
    name = getattr(function, "__name__", "")
    if isinstance(function, type):
        raise UserError(f"register_model({name!r}, {name}, CONFIG) registers a class; a decorator goes on a function")
    with torch.device("meta"):
        built = function()
    if not isinstance(built, Network) or not isinstance(getattr(built, "config", None), Config):
        raise UserError(f"{name} is registered as a model and returned {type(built).__name__}: expected a Network")
    register_model(name, type(built), built.config, (function.__doc__ or "").strip().partition("\n")[0])


def register_variants(network: type[Network], variants: Mapping[str, Config], kind: Kind = "denoiser") -> None:
    """Register a family's sizes in one call."""
    for name, config in variants.items():
        register_model(name, network, config, kind=kind)


def _load_plugins() -> None:
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group="diffzoo.models"):
            point.load()


def entry(name: str) -> ModelEntry:
    """The entry of a name; of `module:name`, where importing a module of one's own registers the name.

    Raises:
        UserError: for an unknown name; names the nearest.
    """
    _load_plugins()
    if not isinstance(name, str):
        raise UserError(f"expected the name of a model, got {name!r:.80}")
    module, _, last = name.rpartition(":")
    if module.isidentifier() and last:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"{name}: there is no module {error.name!r}, beside the recipe or installed") from error
        name = last
    if name not in _REGISTRY:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, _REGISTRY) or '; `diffzoo list` shows all names'}")
    return _REGISTRY[name]


def is_model(name: str) -> bool:
    """Whether `name`, with or without the tag of published weights behind a dot, is registered."""
    _load_plugins()
    return isinstance(name, str) and name.split(".", 1)[0] in _REGISTRY


def matching(names: Iterable[str], patterns: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    """The names that match one of the shell patterns and none of those to exclude; of `model.tag`, the model may match.

    Args:
        names: in the order of the result.
        patterns: such as "simple_*"; "" means all.
        exclude: patterns.

    Raises:
        UserError: for patterns that are no text.
    """
    wanted, unwanted = (
        [*p] if isinstance(p, Iterable) and not isinstance(p, str) else [p] for p in (patterns or "*", exclude or ())
    )
    for pattern in (*wanted, *unwanted):
        if not isinstance(pattern, str):
            raise UserError(f"expected shell patterns such as 'simple_*', got {pattern!r}")

    def fits(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.split(".", 1)[0], pattern)

    return [n for n in names if any(fits(n, p) for p in wanted) and not any(fits(n, p) for p in unwanted)]


def list_models(
    patterns: str | Sequence[str] = "*", kind: Kind = "denoiser", exclude_filters: str | Sequence[str] = ()
) -> list[str]:
    """Sorted names of one kind that match a shell pattern such as "simple_*", or one of several."""
    _load_plugins()
    check_choice("kind", kind, Kind)
    return matching(sorted(n for n, e in _REGISTRY.items() if e.kind == kind), patterns, exclude_filters)


def build(name: str, **overrides: object) -> Network:
    """A network with random weights; `overrides` are rewrites of its config (`Config.override`)."""
    found = entry(name)
    return found.network(found.config.override(**overrides))
