"""Reading tensors from the files that people hold, and finding a network's weights among them.

Safetensors (one file or sharded) are memory-mapped. Everything else is taken for a PyTorch pickle and opened with
`weights_only=True`: a file that wants to run code is refused and nothing runs.

A training checkpoint holds several sets of weights under names of its framework: raw and averaged ones, wrapped by
DataParallel (`module.`) or compile (`_orig_mod.`), below the attribute of a LightningModule (`model.`, `network.`).
`find_weights` looks for the one set whose names are the network's behind a common prefix.
"""

import codecs
import json
import pickle
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean

__all__ = ["Tensors", "averages_in", "find_weights", "read_header", "read_pickle", "read_tensors", "weight_map"]

Tensors = dict[str, Tensor]
INDEX = ".safetensors.index.json"
ZIP = b"PK\x03\x04"
# what pickles call to make plain objects, by which a reader knows them; anything else in the standard library may act
NUMPY = {
    "scalar": "numpy scalar",
    "_reconstruct": "numpy.ndarray",
    "_frombuffer": "numpy.ndarray",
    "dtype": "numpy.dtype",
}
DATA = frozenset(
    {"argparse.Namespace", "collections.defaultdict", "collections.deque", "datetime.date", "datetime.datetime"}
    | {"datetime.timedelta", "decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace", "uuid.UUID"}
)
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# names that other frameworks give to averaged weights; those of the raw weights follow
AVERAGED = ("ema_state_dict", "state_dict_ema", "ema", "model_ema", "ema_model", "ema_network", "averages", "average")
RAW = ("current_model_state", "state_dict", "model", "network", "net", "model_state_dict", "weights")


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    said = f" ({reason})" if len(reason) <= 120 else ""  # no sentence is cut in the middle
    return UserError(f"{path} is damaged or incomplete{said}: fetch or write it again")


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of the shards that an index names, memory-mapped.

    Raises:
        UserError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.name.endswith(INDEX):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error) from error
    shards = weight_map(path)
    tensors: Tensors = {}
    for name in sorted(set(shards.values())):
        shard = path.parent / name
        if not shard.is_file():
            raise UserError(f"{path} needs the shard {name}, which is missing: fetch it again")
        tensors |= read_tensors(shard)
    missing = [name for name in shards if name not in tensors]
    if missing:
        raise UserError(f"the shards of {path} lack {len(missing)} tensors, for example {missing[0]}: fetch them again")
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by the index of a sharded checkpoint; all files lie beside it.

    Raises:
        UserError: if it is no such index, or names anything but safetensors files in its own folder.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(index, error) from error
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} is not the index of a sharded checkpoint: expected a mapping under 'weight_map'")
    for name in shards.values():
        # a path, or another index, would lead out of the folder or round in a circle
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise UserError(
                f"{index} names the shard {name!r}: expected the plain name of a .safetensors file beside it; nothing "
                "was loaded"
            )
    return shards


def read_pickle(path: Path) -> Any:
    """The content of a PyTorch file, with tensors, numbers, strings and containers only; memory-mapped if it can be.

    A folder is a checkpoint in shards, of which the weights are read, not the optimizer.

    Raises:
        UserError: if it holds anything else (nothing is run), is something else, or is damaged.
    """
    if path.is_dir():
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(200)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and archives, of which we speak ourselves
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(ZIP))
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle end in whatever the reader runs into
        raise _refusal(path, head, error) from error


def _refusal(path: Path, head: bytes, error: Exception) -> UserError:
    """One sentence for a file that is no PyTorch file of plain weights."""
    found = re.search(r"GLOBAL ([A-Za-z_][\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found:
        kind = _type_name(found.group(1))
        does = f"holds an object of type {kind}" if kind else f"wants to run {found.group(1)} while it is opened"
        return UserError(
            f"{path} {does}: a file of weights holds tensors, numbers and containers only; it was refused and nothing "
            "was run: where it comes from, save the state dict alone"
        )
    if "TorchScript" in str(error):
        return UserError(
            f"{path} is a TorchScript archive, which holds a program: save the weights alone, with "
            "torch.save(module.state_dict(), ...)"
        )
    protocol = _protocol(path, head)
    if protocol > 3:
        return UserError(
            f"{path} is a pickle of protocol {protocol}, and only 2 and 3 can be read without running what is in it: "
            "write it again with torch.save and its default protocol"
        )
    if head.startswith(b"version https://git-lfs"):
        return UserError(f"{path} is a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`")
    if re.match(rb".{8}\{", head, re.DOTALL):
        return UserError(f"{path} is a safetensors file: give it a name that ends in .safetensors")
    text = _text(head)
    if text:
        first = text.splitlines()[0][:40]
        return UserError(f"{path} is a text file that begins {first!r}, not a file of weights: fetch it again")
    if isinstance(error, RuntimeError) and "magic number" in str(error):
        return UserError(
            f"{path} is a pickle that torch.save did not write: load it and write it again with torch.save"
        )
    if head.startswith(ZIP) and "not in a subdirectory" in str(error):
        return UserError(f"{path} is a ZIP archive that torch.save did not write: expected a file of weights")
    return _damaged(path, error)


def _text(head: bytes) -> str:
    """The beginning of a file if it is text, else nothing."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end inside a letter
    except UnicodeDecodeError:
        return ""
    return text.strip() if all(c.isprintable() or c in "\r\n\t" for c in text) else ""


def _type_name(name: str) -> str | None:
    """The type of object that a pickle's global stands for, if objects are all that it makes."""
    module, _, last = name.rpartition(".")
    top = IMPORT_MAPPING.get(module, module or "builtins").partition(".")[0]  # which may be Python 2's
    if top == "numpy" and last in NUMPY:
        return NUMPY[last]
    if name in DATA or top == "pathlib" or (top not in sys.stdlib_module_names and last[:1].isupper()):
        return name
    return None


def _protocol(path: Path, head: bytes) -> int:
    """The protocol of a pickle, alone or in an archive; 0 if it does not say so."""
    if head.startswith(ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                with archive.open(name) as file:
                    head = file.read(2)
        except (zipfile.BadZipFile, StopIteration):
            return 0
    return head[1] if len(head) > 1 and head[0] == 0x80 else 0


def _read_shards(folder: Path) -> dict[str, Any]:
    """A checkpoint of FSDP2 as Lightning writes it: `meta.pt` beside files of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not (folder / ".metadata").is_file() or not (folder / "meta.pt").is_file():
        raise UserError(f"{folder} is no checkpoint: expected a file, or a folder of shards with .metadata and meta.pt")
    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    prefix = "state_dict."
    state = {
        name.removeprefix(prefix): torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in held.items()
        if name.startswith(prefix) and isinstance(metadata, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process reads them all, which is what it remarks on
        load({"state_dict": state}, checkpoint_id=folder, no_dist=True)
    return {**read_pickle(folder / "meta.pt"), "state_dict": state}


# -- finding a network's weights


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of compile, DataParallel and the like."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tensors(data: Any) -> Tensors:
    if not isinstance(data, Mapping):
        return {}
    return {_plain(k): v for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)}


def averages_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensors]:
    """The averages that our training stores, by label; empty for other files."""
    for key in ("diffzoo", "diffzoo_averages"):
        held = checkpoint.get(key)
        averages = held.get("averages") if isinstance(held, Mapping) else None
        if averages:
            return {str(label): _tensors(tensors) for label, tensors in averages.items()}
    return {}


def _nested(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensors]]:
    """Every dict of tensors in `data`, with its path, outermost first."""
    tensors = _tensors(data)
    if tensors:
        yield prefix, tensors
    for key, value in data.items():
        if isinstance(value, Mapping) and isinstance(key, str) and key not in ("optimizer_states", "optimizer", "opt"):
            yield from _nested(value, f"{prefix}.{key}" if prefix else key)


def _without_dots(tensors: Tensors, names: Mapping[str, Any]) -> Tensors:
    """Averages whose names lost their dots, as `LitEma` stores them beside the raw ones; else nothing."""
    squeezed = {name.replace(".", ""): name for name in names}
    for prefix in {k[: -len(s)] for k in tensors for s in squeezed if k.endswith(s) and "ema" in k[: -len(s)]}:
        if all(prefix + s in tensors for s in squeezed):
            return {name: tensors[prefix + s] for s, name in squeezed.items()}
    return {}


def _prefixes(tensors: Tensors, names: Mapping[str, Any]) -> list[str]:
    """Prefixes behind which every one of `names` is found."""
    first = next(iter(names))
    candidates = [k[: -len(first)] for k in tensors if k == first or k.endswith("." + first)]
    return [p for p in candidates if all(p + name in tensors for name in names)]


def _candidates(data: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for path, tensors in _nested(data):
        for prefix in _prefixes(tensors, names):
            place = f"{path}.{prefix}".strip(".")
            rest = [k for k in tensors if k.startswith(prefix) and k[len(prefix) :] not in names]
            if prefix or not rest:  # without a prefix nothing may be left over: strict loading would be a lie
                found[place] = {name: tensors[prefix + name] for name in names}
        squeezed = _without_dots(tensors, names)
        if squeezed:
            found[f"{path}.ema without dots".strip(".")] = squeezed
    return found


def _is_average(place: str, data: Mapping[str, Any]) -> bool:
    if "current_model_state" in data and place.split(".")[0] == "state_dict":
        return True  # Lightning's WeightAveraging swaps: `state_dict` is the average
    return any(word in re.split(r"[. ]", place) for word in AVERAGED)


def find_weights(
    data: Mapping[str, Any], names: Mapping[str, Any], what: str, weights: str = "ema"
) -> tuple[Tensors, str]:
    """The tensors called `names`, from wherever in a checkpoint they lie.

    Args:
        data: a state dict or a training checkpoint.
        names: the network's state dict, or anything with its names as keys.
        what: the file, for messages.
        weights: "ema" (the default: an EMA if there is one), "raw", or the label of an EMA.

    Returns:
        The tensors by the network's names, and the place where they were found.

    Raises:
        UserError: if no set of weights has exactly these names, or there is no such EMA.
    """
    ours = averages_in(data)
    if weights not in ("ema", "raw") and weights not in ours:
        raise UserError(f"{what} holds no EMA {weights!r}{did_you_mean(weights, ours)}")
    found = _candidates(data, names)
    raw = {place: t for place, t in found.items() if not _is_average(place, data)}
    if ours and weights != "raw":
        label = next(iter(ours)) if weights == "ema" else weights
        base = next(iter(raw.values()), {})
        merged = base | {k: v for k, v in ours[label].items() if k in names}  # frozen weights have no average
        if merged.keys() == dict(names).keys():
            return merged, label
    averaged = {place: t for place, t in found.items() if _is_average(place, data)}
    order = [raw, averaged] if weights == "raw" else [averaged, raw]
    for group in order:
        if group:
            place = min(group, key=len)
            return group[place], place or "the top level"
    raise UserError(_mismatch(data, names, what))


def _mismatch(data: Mapping[str, Any], names: Mapping[str, Any], what: str) -> str:
    largest = max((tensors for _, tensors in _nested(data)), key=len, default={})
    if not largest:
        return f"{what} holds no tensors"
    suffixes = {".".join(k.split(".")[i:]) for k in largest for i in range(len(k.split(".")))}
    missing = [name for name in names if name not in suffixes]
    extra = [k for k in largest if not any(".".join(k.split(".")[i:]) in names for i in range(len(k.split("."))))]
    parts = [f"{len(missing)} of the network's {len(names)} tensors are not in it"]
    parts[0] += f", for example {missing[0]}" if missing else ""
    if extra:
        parts.append(f"{len(extra)} of its tensors are not the network's, for example {extra[0]}")
    return f"the weights in {what} belong to another network: {'; '.join(parts)}"
