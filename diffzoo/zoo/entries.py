"""Weights of manifest entries: fetched, converted once, kept in the cache under a hash of all that they depend on."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor

from diffzoo import formats
from diffzoo.cache import cache_dir, free_space_for, lock
from diffzoo.errors import UserError
from diffzoo.models.base import Config
from diffzoo.pins import record_first, weights_record
from diffzoo.record import to_plain
from diffzoo.tensors import state_sha256, write_tensors
from diffzoo.zoo.building import Weights, build_meta, mismatch
from diffzoo.zoo.fetch import Original, fetch
from diffzoo.zoo.finding import Convert, find_weights
from diffzoo.zoo.manifest import Pretrained

__all__ = ["convert", "converted_path", "converter_of", "entry_weights", "from_layouts"]

LAYOUT = 2  # of converted files: raise it when a converter changes what it gives


def converted_path(item: Pretrained) -> Path:
    """Where the converted weights of an entry lie, whether or not they are there yet."""
    depends_on = [str(item.source), item.sha256, item.converter, to_plain(item.config), LAYOUT]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / item.name / f"{key}.safetensors"


def convert(item: Pretrained, original: Original) -> formats.Tensors:
    """The tensors of an original file under our names.

    Raises:
        UserError: if they are not what the network needs, or not those that another source of the entry gave.
    """
    state = _converted(item, original)
    problem = mismatch(build_meta(item.metadata.network, item.config).state_dict(), state)
    if problem:
        raise UserError(f"{original.source} does not fit {item.model}: {problem}")
    if not item.mirrors:
        return state
    digest = state_sha256(state)
    known = item.state_sha256 or record_first(weights_record(item.name), {"state_sha256": digest})["state_sha256"]
    if digest != known:
        raise UserError(
            f"{original.source} does not hold the weights that {item.name} is known by: expected converted weights of "
            f"sha256 {known}, got {digest}"
        )
    return state


def _converted(item: Pretrained, original: Original) -> formats.Tensors:
    converter = original.source.converter or item.converter
    if converter == "diffzoo":
        return formats.read_tensors(original.path)
    read = converter_of(item, converter).from_official
    data = formats.read_any(original.path)
    if all(isinstance(v, Tensor) for v in data.values()):
        state: formats.Tensors = read(data, item.config)
        return state
    names = build_meta(item.metadata.network, item.config).state_dict()
    layouts = from_layouts({converter: item}, item.config, names)
    return find_weights(data, names, str(original.path), convert=layouts)[0]


def from_layouts(layouts: Mapping[str | None, Pretrained], config: Config, names: Mapping[str, Tensor]) -> Convert:
    """What reads tensors in one of the authors' layouts, as `find_weights` takes it.

    Args:
        layouts: an entry by the name of its converter.
        config: of the network.
        names: its state dict.
    """

    def convert(tensors: formats.Tensors) -> formats.Tensors | None:
        for converter, item in layouts.items():
            with suppress(UserError, KeyError, AttributeError):
                state: formats.Tensors = converter_of(item, converter).from_official(tensors, config)
                if not mismatch(names, state):
                    return state
        return None

    return convert


def converter_of(item: Pretrained, name: str | None = None) -> ModuleType:
    """A module of `diffzoo.zoo.converters`: that of an entry, or of one of its sources."""
    name = name or item.converter
    try:
        return import_module(f"diffzoo.zoo.converters.{name}")
    except ModuleNotFoundError:
        raise UserError(f"checkpoints.yaml: {item.name}.converter: there is no {name!r}") from None


def entry_weights(item: Pretrained) -> Weights:
    """The weights of an entry; the original is fetched and converted where that was not done before."""
    path = converted_path(item)
    if item.source.kind == "package":  # already ours, already on disk
        original = fetch(item)
        metadata = item.metadata.derived(**original.provenance)
        return Weights(formats.read_tensors(original.path), metadata, item.name)
    if not path.is_file():
        with lock(path):
            if not path.is_file():
                original = fetch(item)
                state = convert(item, original)
                free_space_for(sum(v.nbytes for v in state.values()), path)
                write_tensors(path, state, {"original": json.dumps(original.provenance)})
    provenance = json.loads(formats.read_header(path)["original"])
    return Weights(formats.read_tensors(path), item.metadata.derived(**provenance), item.name)
