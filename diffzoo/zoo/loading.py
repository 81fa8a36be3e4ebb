"""From any source of weights to a network, without initialising it first.

A network is built with its parameters on the meta device (no memory, no random numbers) and then takes the tensors
of a memory-mapped file as they are: the pages are read on first use. Converted files are private mappings, so training
in place never writes to them.
"""

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from diffzoo.cache import cache_dir, free_space_for, lock
from diffzoo.errors import UserError
from diffzoo.hub import check_repo, hub_file
from diffzoo.models.base import Config, Network
from diffzoo.models.registry import Kind, config_to_dict, entry, list_models
from diffzoo.process import GaussianProcess, to_config
from diffzoo.tensors import write_tensors
from diffzoo.zoo import formats
from diffzoo.zoo.fetch import fetch
from diffzoo.zoo.manifest import Checkpoint, checkpoint, entry_config, has_checkpoint, load_manifest
from diffzoo.zoo.metadata import Metadata, class_list

__all__ = [
    "Loaded",
    "Weights",
    "assign",
    "build_meta",
    "convert",
    "converted_path",
    "entry_config",
    "file_metadata",
    "folder_file",
    "json_metadata",
    "load_any",
    "locate",
]

LAYOUT = 1  # of converted files: raise it when a converter changes what it gives

# in-place operations that fill a tensor: on the meta device they change nothing and cost half a second per 500 M
_FILLS = frozenset(
    {"add_", "clamp_", "clamp_max_", "clamp_min_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_"}
    | {"uniform_", "zero_"}
)


class _SkipFills(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init passes it by name
        if getattr(func, "__name__", "") in _FILLS and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **(kwargs or {}))


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules built in the block, by this thread, get parameters on the meta device; buffers stay real."""
    owner = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != owner or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _SkipFills():
            yield
    finally:
        handle.remove()


def build_meta(network: type[Network], config: Config) -> Network:
    """A network whose parameters have shapes but no values, in eval mode; its buffers are real."""
    with _meta_parameters():
        return network(config).eval()


def assign(network: Network, state: Mapping[str, Tensor], what: str) -> Network:
    """Give a network from `build_meta` its tensors, without copying those that have the right type.

    Raises:
        UserError: if names or shapes differ, saying which.
    """
    wanted = network.state_dict()
    problem = _difference(wanted, state)
    if problem:
        raise UserError(f"the weights in {what} do not fit this network: {problem}")
    network.load_state_dict({k: state[k].to(v.dtype) for k, v in wanted.items()}, strict=True, assign=True)
    left = [k for k, v in (*network.named_parameters(), *network.named_buffers()) if v.is_meta]
    if left:
        raise RuntimeError(f"{type(network).__name__} left {left[0]} without a value")
    return network


def _difference(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    kinds = (("missing", missing), ("unknown", extra))
    parts = [f"{len(names)} {kind}, for example {names[0]}" for kind, names in kinds if names]
    if shapes:
        k = shapes[0]
        parts.append(f"{k} should have shape {tuple(wanted[k].shape)}, got {tuple(state[k].shape)}")
    return "; ".join(parts)


# -- weights and what is known about them


@dataclass(frozen=True)
class Weights:
    """Tensors under a network's own names, with their facts and the place they come from."""

    state: Mapping[str, Tensor]
    metadata: Metadata
    where: str


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, ready to use, and what is known about them."""

    network: Network
    metadata: Metadata

    @property
    def process(self) -> GaussianProcess:
        """The process it was trained with; raises if it is not known."""
        return self.metadata.build_process()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order of the class index; empty if there are none."""
        return class_list(self.metadata.class_names)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from."""
        return self.metadata.provenance


# -- manifest entries


def entry_metadata(item: Checkpoint, original: Mapping[str, Any]) -> Metadata:
    """The facts of a manifest entry; `original` are those of the original file."""
    from diffzoo import __version__

    companion = item.autoencoder
    return Metadata(
        family=entry(item.model).network.__name__,
        config=config_to_dict(entry_config(item)),
        name=item.model,
        process=to_config(item.build_process()),
        class_names=item.classes or (),
        guidance=dict(item.guidance) if item.guidance else None,
        sampler=dict(item.sampler) if item.sampler else None,
        autoencoder={k: v for k, v in vars(companion).items() if v is not None} if companion else None,
        text_encoder=dict(item.text_encoder) if item.text_encoder else None,
        settings={name: dict(setting) for name, setting in item.settings.items()},
        licence=item.weights_licence,
        provenance={"checkpoint": item.name, "source": str(item.source), **original},
        version=__version__,
    )


def converted_path(item: Checkpoint) -> Path:
    """Where the converted weights of an entry lie, whether or not they are there yet."""
    told = [str(item.source), item.sha256, item.converter, config_to_dict(entry_config(item)), LAYOUT]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / item.name / f"{key}.safetensors"


def convert(item: Checkpoint, path: Path) -> formats.Tensors:
    """The tensors of an original file under our names."""
    config = entry_config(item)
    if item.converter == "diffzoo":
        return formats.read_tensors(path)
    data = formats.read_tensors(path) if path.suffix == ".safetensors" else formats.read_pickle(path)
    state: formats.Tensors = converter_of(item).from_official(data, config)
    return state


def converter_of(item: Checkpoint) -> ModuleType:
    """The module of `diffzoo.zoo.converters` for an entry."""
    try:
        return import_module(f"diffzoo.zoo.converters.{item.converter}")
    except ModuleNotFoundError:
        raise UserError(f"checkpoints.yaml: entry '{item.name}', field 'converter': no {item.converter!r}") from None


def _entry_weights(item: Checkpoint) -> Weights:
    path = converted_path(item)
    if item.source.kind == "package":  # already ours, already on disk
        path, original = fetch(item)
        return Weights(formats.read_tensors(path), entry_metadata(item, original), item.name)
    if not path.is_file():
        with lock(path):
            if not path.is_file():
                _convert_once(item, path)
    original = json.loads(formats.read_header(path)["original"])
    return Weights(formats.read_tensors(path), entry_metadata(item, original), item.name)


def _convert_once(item: Checkpoint, path: Path) -> None:
    source, original = fetch(item)
    state = convert(item, source)
    problem = _difference(build_meta(entry(item.model).network, entry_config(item)).state_dict(), state)
    if problem:
        raise UserError(f"{item.source} does not fit {item.model}: {problem}")
    free_space_for(sum(v.nbytes for v in state.values()), path)
    write_tensors(path, state, {"original": json.dumps(original)})


# -- files and folders


def _header_metadata(path: Path) -> Metadata | None:
    held = formats.read_header(path).get("diffzoo")
    return Metadata.from_dict(json.loads(held), f"the header of {path}") if held else None


def json_metadata(path: Path, where: str = "") -> Metadata:
    """The facts in a `config.json`; `where` is its name in messages.

    Raises:
        UserError: if it is damaged, or does not say which network it is about.
    """
    where = where or str(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding, too
        raise UserError(f"{where} is not valid JSON ({error}): fetch it again") from error
    return Metadata.from_dict(data, where)


def _checkpoint_metadata(data: Any, path: Path) -> Metadata | None:
    held = data.get("diffzoo") if isinstance(data, Mapping) else None
    if not isinstance(held, Mapping) or "model" not in held:
        return None
    known = ("process", "class_names", "guidance", "autoencoder", "text_encoder", "adapter", "version")
    values = {k: held[k] for k in known if held.get(k)}
    if sampler := held.get("sampler"):
        values["sampler"] = {"class": sampler} if isinstance(sampler, str) else sampler
    trained = {"checkpoint": path.name, "global_step": data.get("global_step"), "epoch": data.get("epoch")}
    return Metadata.from_dict({**held["model"], **values, "provenance": trained}, str(path))


def _sidecar_metadata(path: Path) -> Metadata | None:
    """Metadata from beside a bare file: `config.json` in its folder, or the newest checkpoint of its run."""
    if (path.parent / "config.json").is_file():
        return json_metadata(path.parent / "config.json")
    for run in list(path.parents)[1:4]:  # averages/x, averages/reconstructed/x
        newest = _run_file(run)
        if newest is not None:
            return _checkpoint_metadata(formats.read_pickle(newest), newest)
    return None


def _require(metadata: Metadata | None, path: Path) -> Metadata:
    if metadata is None:
        raise UserError(
            f"{path} does not say which network its weights belong to: name it, "
            f"create_model(NAME, pretrained={str(path)!r})"
        )
    return metadata


def _file_weights(path: Path, prefer: str, metadata: Metadata | None = None) -> Weights:
    """Weights in a file; `metadata` says which network, where the file does not."""
    if path.name.endswith((".safetensors", formats.INDEX)):
        data: Any = formats.read_tensors(path)
        own = _header_metadata(path) if path.suffix == ".safetensors" else None
        known = own or metadata or _sidecar_metadata(path)
    else:
        data = formats.read_pickle(path)
        known = _checkpoint_metadata(data, path) or metadata
    known = _require(known, path)
    if not isinstance(data, Mapping):
        raise UserError(f"expected a dictionary of tensors in {path}, got {type(data).__name__}")
    if known.adapter:
        from diffzoo.zoo import adapters  # which loads what they belong to

        return adapters.join(*adapters.read_adapter(path, known, prefer, data), str(path))
    state, place = _find(data, known, path, prefer)
    return Weights(
        state, replace(known, provenance={**known.provenance, "file": str(path), "weights": place}), str(path)
    )


def _find(data: Mapping[str, Any], metadata: Metadata, path: Path, prefer: str) -> tuple[formats.Tensors, str]:
    config = metadata.build_config()
    names = build_meta(metadata.network_class(), config).state_dict()
    found: tuple[formats.Tensors, str] | UserError
    try:
        found = formats.find_weights(data, names, str(path), prefer)
        if not _difference(names, found[0]):
            return found
    except UserError as error:
        found = error
    # perhaps the layout of the original authors, which the model's converter reads
    for item in load_manifest().values():
        if item.model == metadata.name and item.converter != "diffzoo":
            with suppress(UserError, KeyError, AttributeError):
                state = converter_of(item).from_official(data, config)
                if not _difference(names, state):
                    return state, f"converted by {item.converter}"
    owners = _owners(data)
    if owners:
        raise UserError(
            f"expected the weights of {metadata.name or metadata.family} in {path}, got those of "
            f"{' or '.join(owners)}: "
            f"build that network instead, create_model({owners[0]!r}, pretrained={str(path)!r})"
        )
    if isinstance(found, UserError):
        raise found
    return found  # of other shapes, which `assign` names


def _owners(data: Mapping[str, Any]) -> list[str]:
    """The registered models whose tensors these are, under our names or those of the original authors."""
    given = {k: tuple(v.shape) for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if sum(math.prod(shape) for shape in given.values()) < 1_000_000:  # less than the smallest has
        return []
    converters = {item.model: item for item in load_manifest().values() if item.converter != "diffzoo"}
    found = []
    for name in (n for kind in get_args(Kind) for n in list_models(kind=kind)):
        model = entry(name)
        state = build_meta(model.network, model.config).state_dict()
        layouts = [state]
        if name in converters:
            layouts.append(converter_of(converters[name]).to_official(state, model.config))
        if any({k: tuple(v.shape) for k, v in layout.items()} == given for layout in layouts):
            found.append(name)
    return found


def _step(path: Path) -> tuple[float, float]:
    """Order of a run's checkpoints: by the step in the name; times of files change when a run is copied."""
    if path.name == "last.ckpt":  # Lightning's own, where a run has it
        return (float("inf"), 0.0)
    found = re.search(r"step[_=](\d+)", path.name)
    return (float(found.group(1)) if found else -1.0, path.stat().st_mtime)


def _run_file(folder: Path) -> Path | None:
    """The newest checkpoint of a run directory, or of its folder `checkpoints`."""
    place = folder if folder.name == "checkpoints" else folder / "checkpoints"
    found = [p for p in place.glob("*.ckpt") if not p.name.startswith(".")]
    return max(found, key=_step) if found else None


def file_metadata(path: Path) -> Metadata | None:
    """What a file says about the weights in it, or what lies beside it."""
    if path.suffix == ".safetensors":
        return _header_metadata(path) or _sidecar_metadata(path)
    return _checkpoint_metadata(formats.read_pickle(path), path)


def folder_file(folder: Path) -> Path:
    """The file of weights in a folder in our published form, or in a run.

    Raises:
        UserError: if there is none.
    """
    for name in ("model.safetensors", f"model{formats.INDEX}", "adapter.safetensors"):
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():  # a checkpoint in shards
        return folder
    run = _run_file(folder)
    if run is None:
        raise UserError(
            f"no weights in {folder}: expected model.safetensors with config.json, or a run with checkpoints/*.ckpt"
        )
    return run


def _hub_weights(repo: str, revision: str | None, prefer: str) -> Weights:
    check_repo(repo)
    config, commit = hub_file(repo, "config.json", revision)
    metadata = json_metadata(config, f"{repo}/config.json")
    try:
        path, _ = hub_file(repo, "adapter.safetensors" if metadata.adapter else "model.safetensors", commit)
    except UserError as error:
        if "no such file" not in str(error):
            raise
        try:
            path, _ = hub_file(repo, f"model{formats.INDEX}", commit)
        except UserError:
            raise error from None  # most have one file, so that is the one to ask for
        for shard in sorted(set(formats.weight_map(path).values())):
            hub_file(repo, shard, commit)
    found = _file_weights(path, prefer, metadata)
    provenance = {**(found.metadata if metadata.adapter else metadata).provenance, "repo": repo, "revision": commit}
    return Weights(found.state, replace(metadata, adapter=None, provenance=provenance), f"hf-hub:{repo}@{commit}")


def locate(source: str | Path, prefer: str = "average", metadata: Metadata | None = None) -> Weights:
    """Weights and facts behind a source.

    Args:
        source: a registered `name` or `name.tag`; "hf-hub:owner/repo@revision"; "local-dir:path"; a run directory; a
            folder in our published form; a file: `.ckpt`, `.pt`, `.pth`, `.safetensors`, sharded safetensors' index.
        prefer: which weights of a checkpoint: "average", "raw" or the label of an average.
        facts: which network the weights belong to, for files that do not say so.

    Raises:
        UserError: if there is nothing, or it cannot be read.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        repo, _, revision = text.removeprefix("hf-hub:").partition("@")
        return _hub_weights(repo, revision or None, prefer)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return _file_weights(folder_file(path), prefer, metadata)
    if path.is_file():
        return _file_weights(path, prefer, metadata)
    if text.startswith("local-dir:") or path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json"):
        raise UserError(f"there is no file or folder {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not has_checkpoint(text):
        raise UserError(f"there is no folder {text}; a repository of the Hub is written hf-hub:{text}")
    return _entry_weights(checkpoint(text))


def load_any(source: str | Path, *, prefer: str = "average") -> Loaded:
    """A network with its weights from any source, in eval mode on the CPU.

    Args:
        source, prefer: see `locate`.

    Raises:
        UserError: one sentence for whatever is missing, wrong or unreachable.
    """
    found = locate(source, prefer)
    network = build_meta(found.metadata.network_class(), found.metadata.build_config())
    network.metadata = found.metadata
    return Loaded(assign(network, found.state, found.where), found.metadata)
