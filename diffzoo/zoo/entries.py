"""Weights of manifest entries: fetched, converted once, kept in the cache under a hash of all that they depend on."""

import hashlib
import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor

from diffzoo.cache import cache_dir, free_space_for, lock
from diffzoo.errors import UserError
from diffzoo.record import to_plain
from diffzoo.tensors import write_tensors
from diffzoo.zoo import formats
from diffzoo.zoo.building import Weights, build_meta, mismatch
from diffzoo.zoo.fetch import fetch
from diffzoo.zoo.finding import find_weights
from diffzoo.zoo.manifest import Pretrained

__all__ = ["convert", "converted_path", "converter_of", "entry_weights"]

LAYOUT = 1  # of converted files: raise it when a converter changes what it gives


def converted_path(item: Pretrained) -> Path:
    """Where the converted weights of an entry lie, whether or not they are there yet."""
    depends_on = [str(item.source), item.sha256, item.converter, to_plain(item.config), LAYOUT]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / item.name / f"{key}.safetensors"


def convert(item: Pretrained, path: Path) -> formats.Tensors:
    """The tensors of an original file under our names."""
    if item.converter == "diffzoo":
        return formats.read_tensors(path)
    read = converter_of(item).from_official
    data = formats.read_any(path)
    if all(isinstance(v, Tensor) for v in data.values()):
        state: formats.Tensors = read(data, item.config)
        return state

    def convert(tensors: formats.Tensors) -> formats.Tensors | None:
        with suppress(UserError, KeyError):
            state: formats.Tensors = read(tensors, item.config)
            return state
        return None

    names = build_meta(item.metadata.network, item.config).state_dict()
    return find_weights(data, names, str(path), convert=convert)[0]


def converter_of(item: Pretrained) -> ModuleType:
    """The module of `diffzoo.zoo.converters` for an entry."""
    try:
        return import_module(f"diffzoo.zoo.converters.{item.converter}")
    except ModuleNotFoundError:
        raise UserError(f"checkpoints.yaml: {item.name}.converter: there is no {item.converter!r}") from None


def entry_weights(item: Pretrained) -> Weights:
    """The weights of an entry; the original is fetched and converted where that was not done before."""
    path = converted_path(item)
    if item.source.kind == "package":  # already ours, already on disk
        path, original = fetch(item)
        return Weights(formats.read_tensors(path), item.metadata.derived(**original), item.name)
    if not path.is_file():
        with lock(path):
            if not path.is_file():
                _convert_once(item, path)
    original = json.loads(formats.read_header(path)["original"])
    return Weights(formats.read_tensors(path), item.metadata.derived(**original), item.name)


def _convert_once(item: Pretrained, path: Path) -> None:
    source, original = fetch(item)
    state = convert(item, source)
    problem = mismatch(build_meta(item.metadata.network, item.config).state_dict(), state)
    if problem:
        raise UserError(f"{item.source} does not fit {item.model}: {problem}")
    free_space_for(sum(v.nbytes for v in state.values()), path)
    write_tensors(path, state, {"original": json.dumps(original)})
