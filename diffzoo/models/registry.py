"""The registry: one dict from a name to a network class and its config.

Names are `family_size_resolution`, in snake case: `simple_uvit_256`, `dimr_xl_256`. Third-party packages register
through the entry-point group `diffzoo.models`: each entry point names a module that calls `register_model`.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config, Network

__all__ = [
    "ModelEntry",
    "build",
    "entry",
    "list_models",
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


_REGISTRY: dict[str, ModelEntry] = {}
_plugins_loaded = False


def register_model(
    name: str, network: type[Network], config: Config, note: str = "", kind: Kind = "denoiser"
) -> ModelEntry:
    """Register a network under a name.

    Args:
        name: snake case, `family_size_resolution`.
        network: class whose constructor takes the config.
        config: of this size.
        note: one line for `describe`, for example that a size is inferred.
        kind: "denoiser", or "classifier" for a noise-aware classifier; `list_models` keeps them apart.

    Raises:
        UserError: if the name is taken.
    """
    if name in _REGISTRY:
        raise UserError(f"a model named {name!r} is already registered: choose another name")
    _REGISTRY[name] = ModelEntry(name, network, config, note, kind)
    return _REGISTRY[name]


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
    """The entry of a name; an unknown one raises and names the nearest."""
    _load_plugins()
    if name not in _REGISTRY:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, _REGISTRY) or '; `diffzoo list` shows all names'}")
    return _REGISTRY[name]


def list_models(pattern: str = "*", kind: Kind = "denoiser") -> list[str]:
    """Sorted names of one kind that match a shell pattern such as "simple_*"."""
    _load_plugins()
    return sorted(n for n in fnmatch.filter(_REGISTRY, pattern) if _REGISTRY[n].kind == kind)


def build(name: str, **overrides: Any) -> Network:
    """A network with random weights; `overrides` are rewrites of its config (`Config.override`)."""
    found = entry(name)
    return found.network(found.config.override(**overrides))
