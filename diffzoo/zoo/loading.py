"""Loading weights from any source: tensors under the network's own names, with their metadata.

A source is a published name, a Hub repository, a folder in our published form, a run, or a file. Low-rank adapters
(`diffzoo.models.adapters`), which lie in `adapter.safetensors` or in a run's checkpoint, are merged into the weights
that they belong to.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from torch import Tensor

from diffzoo import formats
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import sha256 as file_sha256
from diffzoo.hub import HubPlace, NoSuchFileError, check_repo, hub_file, hub_place
from diffzoo.models.adapters import merge, plain_name
from diffzoo.models.registry import entry, list_models
from diffzoo.runs import newest_checkpoint
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.zoo.adapt import adapt_to
from diffzoo.zoo.building import Loaded, Weights, assign, build_meta, mismatch
from diffzoo.zoo.entries import converter_of, entry_weights, from_layouts
from diffzoo.zoo.finding import NothingFits, emas_in, find_weights, state_dicts
from diffzoo.zoo.manifest import find_pretrained, load_manifest
from diffzoo.zoo.metadata import Adapter, Base, Metadata, held_metadata, read_metadata

__all__ = [
    "base_of",
    "emas_of",
    "file_metadata",
    "find_adapter",
    "folder_file",
    "json_metadata",
    "load_any",
    "locate",
    "read_adapter",
]


# a key of `config.json` or `model_index.json` that other libraries write
LIBRARIES = {"_class_name": "diffusers", "pretrained_cfg": "timm"}
LIBRARIES |= dict.fromkeys(("architectures", "model_type"), "transformers")


# -- what files say


def json_metadata(path: Path, where: str = "") -> Metadata:
    """The metadata in a `config.json`; `where` is its name in messages.

    Raises:
        UserError: if it is damaged, or does not say which network it is about.
    """
    where = where or str(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding, too
        raise UserError(f"{where} is not valid JSON ({error}): fetch it again") from error
    library = next((name for key, name in LIBRARIES.items() if isinstance(data, dict) and key in data), None)
    if library is not None and "config" not in data:
        raise UserError(f"{where} is of a model of {library}, which diffzoo does not read: use it with {library}")
    return read_metadata(data, where)


def _header_metadata(path: Path) -> Metadata | None:
    held = formats.read_header(path).get("diffzoo")
    return read_metadata(json.loads(held), f"the header of {path}") if held else None


def _checkpoint_metadata(data: object, path: Path) -> Metadata | None:
    """The metadata in a training checkpoint, with its place in the run."""
    if not isinstance(data, Mapping) or (known := held_metadata(data, str(path))) is None:
        return None
    return known.derived(checkpoint=path.name, global_step=data.get("global_step"), epoch=data.get("epoch"))


def _sidecar_metadata(path: Path) -> Metadata | None:
    """Metadata from beside a bare file: `config.json` in its folder, or the newest checkpoint of its run."""
    if (path.parent / "config.json").is_file():
        return json_metadata(path.parent / "config.json")
    for run in list(path.parents)[1:4]:  # averages/x, averages/reconstructed/x
        newest = newest_checkpoint(run)
        if newest is not None:
            return _checkpoint_metadata(formats.read_pickle(newest), newest)
    return None


def file_metadata(path: Path) -> Metadata | None:
    """What a file says about the weights in it, or what lies beside it."""
    if path.suffix == ".safetensors":
        return _header_metadata(path) or _sidecar_metadata(path)
    return _checkpoint_metadata(formats.read_pickle(path), path)


# -- files and folders


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
    run = newest_checkpoint(folder)
    if run is None:
        for name in ("config.json", "model_index.json"):  # of another library, perhaps
            if (folder / name).is_file():
                json_metadata(folder / name)
        known = (*formats.SUFFIXES[:-1], *formats.INDICES)
        there = [str(p) for depth in ("*", "*/*") for p in folder.glob(depth) if p.name.endswith(known)]
        there.sort(key=lambda name: (name.endswith(formats.INDICES), name))  # an index before its shards
        raise UserError(
            f"no weights in {folder}: expected model.safetensors with config.json, or a run with checkpoints/*.ckpt"
            + (f"; of the files of weights below it, such as {there[-1]}, give one" if there else "")
        )
    return run


def _local_file(source: str | Path) -> Path:
    """The file behind a path, or the file of weights in a folder; there may be none."""
    path = Path(str(source).removeprefix("local-dir:")).expanduser()
    return folder_file(path) if path.is_dir() else path


def _file_weights(path: Path, weights: str, metadata: Metadata | None = None) -> Weights:
    """Weights in a file; `metadata` says which network, where the file does not."""
    data = formats.read_any(path)
    if path.name.endswith((".safetensors", *formats.INDICES)):
        own = _header_metadata(path) if path.suffix == ".safetensors" else None
        known = own or metadata or _sidecar_metadata(path)
    else:
        known = _checkpoint_metadata(data, path) or metadata
    if known is None:
        raise UserError(
            f"{path} does not say which network its weights belong to: name it, "
            f"create_model(NAME, pretrained={str(path)!r})"
        )
    if not isinstance(data, Mapping):
        raise UserError(f"expected a dictionary of tensors in {path}, got {type(data).__name__}")
    if known.adapter is not None:
        tensors, trained = read_adapter(path, known, weights, data)
        return _joined(tensors, known.adapter, trained, str(path))
    state, place = _find(data, known, path, weights)
    return Weights(state, known.derived(file=str(path), weights=place), str(path))


def _find(data: Mapping[str, object], metadata: Metadata, path: Path, weights: str) -> tuple[formats.Tensors, str]:
    """The tensors of a network in a file, and their place there."""
    names = build_meta(metadata.network, metadata.config).state_dict()
    mine = metadata.title
    items = [item for name, item in load_manifest().items() if name.split(".")[0] == mine]
    layouts = {source.converter: item for item in items for source in item.sources if source.converter != "diffzoo"}
    try:
        state, place = find_weights(data, names, str(path), weights, from_layouts(layouts, metadata.config, names))
    except NothingFits:
        found = _look_alikes(data)
        if not found or mine in found:
            raise
        theirs = " or ".join(found)
        raise UserError(
            f"{path} holds the weights of another model than {mine}: by names and shapes, {theirs}"
        ) from None
    if problem := mismatch(names, state):
        raise UserError(f"the weights in {path} do not fit this network: {problem}")
    return state, place


def _look_alikes(data: Mapping[str, object]) -> list[str]:
    """Registered models whose official layout these tensors have, without remainder."""
    layouts = {(item.converter, item.metadata.network): item for item in load_manifest().values()}
    for _, tensors in state_dicts(data):
        found: dict[str, None] = {}
        for (converter, network), item in layouts.items():
            for name in list_models() if converter != "diffzoo" else ():
                if entry(name).network is network:
                    with suppress(UserError, KeyError, AttributeError):
                        converter_of(item).from_official(tensors, entry(name).config)
                        found[name] = None
        if found:
            return list(found)
    return []


# -- low-rank adapters


def read_adapter(
    path: Path, metadata: Metadata, weights: str = "ema", data: Mapping[str, object] | None = None
) -> tuple[dict[str, Tensor], Metadata]:
    """The trained tensors of an adapter's file or checkpoint by plain name, and its metadata with their place.

    Args:
        path: of the file.
        metadata: of the adapter.
        weights: which of a checkpoint: "ema", "raw" or the label of an EMA.
        data: what is in the file, if it is read already.
    """
    if data is None:
        data = formats.read_any(path)
    state, emas = data.get("state_dict", data), emas_in(data)
    if weights not in ("ema", "raw", *emas):
        raise UserError(f"{path} holds no EMA {weights!r}{did_you_mean(weights, emas)}")
    label = "raw" if not emas else next(iter(emas)) if weights == "ema" else weights
    found = state if isinstance(state, Mapping) else {}
    tensors = {plain_name(k): v for k, v in {**found, **emas.get(label, {})}.items() if isinstance(v, Tensor)}
    return tensors, metadata.derived(file=str(path), weights=label)


def find_adapter(source: str | Path) -> tuple[Path, Metadata] | None:
    """The file behind a local source and its metadata, if it holds adapters; None for other sources."""
    path = _local_file(source)
    metadata = file_metadata(path) if path.is_file() else None
    return (path, metadata) if metadata is not None and metadata.adapter is not None else None


def _joined(tensors: Mapping[str, Tensor], adapter: Adapter, metadata: Metadata, where: str) -> Weights:
    """The weights that adapters belong to with the adapters merged in: `W + alpha / rank * B A`.

    Raises:
        UserError: if the base cannot be had, is not the one the adapters were trained on, or has other layers.
    """
    try:
        base = locate(adapter.base)
    except UserError as error:
        raise UserError(
            f"the adapters in {where} belong to the weights {adapter.base}, which cannot be had: {error}"
        ) from error
    network = adapt_to(base, metadata.config)
    state = dict(network.state_dict())
    frozen = {n: p for n, p in network.named_parameters() if n not in tensors}
    if adapter.base_sha256 and state_sha256(frozen, ADAPTER_BASE) != adapter.base_sha256:
        raise UserError(
            f"the adapters in {where} were trained on other weights than {adapter.base} now holds: restore those, or "
            "name their place in the field base of config.json"
        )
    state = merge(state, tensors, adapter.alpha / adapter.rank, where)
    known = metadata.derived(merged=adapter, base=metadata.provenance.base or base_of(base.metadata, adapter.base))
    return Weights(state, replace(known, adapter=None, licence=known.licence or base.metadata.licence), where)


def base_of(metadata: Metadata, source: str | None = None) -> Base:
    """What a training remembers of the weights that it began from.

    Args:
        metadata: of these weights.
        source: how they were asked for; None = where they came from.
    """
    known = metadata.provenance
    hub = f"hf-hub:{known.repo}@{known.revision}" if known.repo else None
    file = Path(known.file or "")
    sha256 = known.sha256
    if sha256 is None and hub is None and file.is_file():
        sha256 = file_sha256(file)
    source = source or known.pretrained or hub or known.file
    if source is not None and Path(source).exists():
        source = str(Path(source).resolve())  # so that it is found from another folder
    return Base(source, metadata.name, metadata.licence, sha256, known)


# -- sources


def _hub_weights(place: HubPlace, weights: str, metadata: Metadata | None) -> Weights:
    repo, revision, _ = place
    check_repo(repo)
    file = PurePosixPath(place.file or "config.json")
    if file.name not in ("config.json", "README.md", "model.safetensors"):
        path, commit = hub_file(repo, str(file), revision)
        found = _file_weights(path, weights, metadata)
        return Weights(found.state, found.metadata.derived(repo=repo, revision=commit), f"hf-hub:{repo}@{commit}")

    def beside(name: str, commit: str | None) -> tuple[Path, str]:
        return hub_file(repo, str(file.with_name(name)), commit)

    try:
        config, commit = beside("config.json", revision)
    except NoSuchFileError as error:
        raise UserError(
            f"{repo} has no {file.with_name('config.json')}, so it is no model of diffzoo: give the address of its "
            "file of weights, and the name of the network, create_model(NAME, pretrained=ADDRESS)"
        ) from error
    metadata = json_metadata(config, f"{repo}/{file.with_name('config.json')}")
    try:
        path, _ = beside("adapter.safetensors" if metadata.adapter else "model.safetensors", commit)
    except NoSuchFileError as error:
        try:
            path, _ = beside(f"model{formats.INDEX}", commit)
        except NoSuchFileError:
            raise error from None  # most have one file, so that is the one to ask for
        for shard in sorted(set(formats.weight_map(path).values())):
            beside(shard, commit)
    found = _file_weights(path, weights, metadata)
    known = found.metadata if metadata.adapter else metadata
    return Weights(found.state, known.derived(repo=repo, revision=commit, file=None), f"hf-hub:{repo}@{commit}")


def emas_of(source: str | Path) -> list[str]:
    """Labels of the EMAs in a run or a checkpoint; empty for other sources."""
    path = _local_file(source)
    return list(emas_in(formats.read_pickle(path))) if path.is_file() and path.suffix == ".ckpt" else []


def locate(source: str | Path, weights: str = "ema", metadata: Metadata | None = None) -> Weights:
    """Weights and metadata behind a source.

    Args:
        source: a registered `name` or `name.tag`; "hf-hub:owner/repo@revision" or the address of a page of the Hub;
            "local-dir:path"; a run directory; a folder in our published form; a file: `.ckpt`, `.pt`, `.pth`, `.pkl`,
            `.safetensors`, sharded safetensors' index.
        weights: which weights of a checkpoint: "ema" (its EMA, where it has one), "raw" or the label of an EMA.
        metadata: which network the weights belong to, for files that do not say so.

    Raises:
        UserError: if there is nothing, or it cannot be read.
    """
    weights = "ema" if weights == "average" else weights  # its name in earlier versions
    if not isinstance(source, str | Path) or source == "":
        raise UserError(f"expected a source of weights, a name or a path, got {source!r:.80}")
    text = str(source)
    place = hub_place(text)
    if place is not None:
        return _hub_weights(place, weights, metadata)
    path = _local_file(text)
    if path.is_file() or path.is_dir():  # a checkpoint in shards is a folder
        return _file_weights(path, weights, metadata)
    if "://" in text:
        raise UserError(f"{text} is no page of the Hub: download the file and give its path{_published_at(text)}")
    if (
        isinstance(source, str)
        and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text)
        and path.suffix not in formats.SUFFIXES
    ):
        raise UserError(f"there is no folder {text}; a repository of the Hub is written hf-hub:{text}")
    if isinstance(source, Path) or "/" in text or path.suffix in formats.SUFFIXES or text.startswith("local-dir:"):
        raise UserError(f"there is no file or folder {path}")
    item = find_pretrained(text)
    if weights != "ema":
        raise UserError(f"{item.name} holds one set of weights, so there are no {weights!r} to choose: leave it out")
    return entry_weights(item)


def _published_at(address: str) -> str:
    """The name of the published weights whose file lies at an address, as the end of a sentence."""
    sources = ((item.name, source) for item in load_manifest().values() for source in item.sources)
    name = next((name for name, s in sources if (s.url or s.drive or " ") in address), None)
    return f", or use {name!r}, which it is published as" if name else ""


def load_any(source: str | Path, *, weights: str = "ema") -> Loaded:
    """A network with its weights from any source, in eval mode on the CPU.

    Args:
        source, weights: see `locate`.

    Raises:
        UserError: one sentence for whatever is missing, wrong or unreachable.
    """
    found = locate(source, weights)
    network = build_meta(found.metadata.network, found.metadata.config)
    network.metadata = found.metadata
    return Loaded(assign(network, found.state, found.where), found.metadata)
