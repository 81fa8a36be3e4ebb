"""Reading tensors from the files that people hold: safetensors, one file or sharded, and what PyTorch writes.

Safetensors files and PyTorch's archives are memory-mapped. No file runs code (`diffzoo.unpickle`). A file of another
kind under one of their names is recognised by its first bytes, and the message says what it is.
"""

import json
import re
import warnings
import zipfile
from codecs import getincrementaldecoder
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.files import HEAD, STRANGERS, kind_of
from diffzoo.unpickle import NotPlainError, load_pickle

__all__ = ["INDEX", "SUFFIXES", "Tensors", "read_any", "read_header", "read_pickle", "read_tensors", "weight_map"]

Tensors = dict[str, Tensor]
INDEX = ".safetensors.index.json"
INDICES = (INDEX, ".bin.index.json")
SUFFIXES = (".ckpt", ".pt", ".pth", ".pkl", ".bin", ".safetensors", ".json")
SAFETENSORS, PYTORCH = "a safetensors file", "a PyTorch file"
UNPACK = "unpack it and give the file of weights in it"
# what a file is by its first bytes, and what to do where something else was expected
KINDS = (
    *STRANGERS,
    (rb"GGUF", "a GGUF file, for llama.cpp and its relatives", "fetch the same weights as .safetensors"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes it", "fetch the weights for PyTorch"),
    (rb"\x93NUMPY", "a NumPy array", "expected the weights of a network"),
    (rb"\x1f\x8b|.{257}ustar", "a compressed archive", UNPACK),
    (rb".{8}\{", SAFETENSORS, "give it a name that ends in .safetensors"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", PYTORCH, "give it a name that ends in .pt"),
)


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    _check_kind(path, SAFETENSORS)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    if not path.stat().st_size:
        return UserError(f"{path} is empty: fetch or write it again")
    reason = str(error).partition("\n")[0]
    said = f" ({reason})" if " " in reason and len(reason) <= 120 else ""  # a sentence, not cut in the middle
    return UserError(f"{path} is damaged or incomplete{said}: fetch or write it again")


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of the shards that an index names, memory-mapped.

    Raises:
        UserError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.name.endswith(INDICES):
        _check_kind(path, SAFETENSORS)
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
        tensors |= read_any(shard)
    missing = [name for name in shards if name not in tensors]
    if missing:
        raise UserError(f"the shards of {path} lack {len(missing)} tensors, for example {missing[0]}: fetch them again")
    return tensors


def read_any(path: Path) -> Any:
    """The content of a file of weights: by its name safetensors, one file or an index, or a PyTorch file."""
    return read_tensors(path) if path.name.endswith((".safetensors", *INDICES)) else read_pickle(path)


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by the index of a sharded checkpoint; all files lie beside it.

    Raises:
        UserError: if it is no such index, or names anything but files of its kind in its own folder.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(index, error) from error
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} is not the index of a sharded checkpoint: expected a mapping under 'weight_map'")
    ending = index.name.removesuffix(".index.json").rpartition(".")[2]
    for name in shards.values():
        # a path or another index could lead out of the folder or around in a circle
        if not isinstance(name, str) or not re.fullmatch(rf"[^/\\]+\.{ending}", name):
            raise UserError(
                f"{index} names the shard {name!r}: expected the plain name of a .{ending} file beside it; nothing "
                "was loaded"
            )
    return shards


def _check_kind(path: Path, wanted: str) -> None:
    """Raise a `UserError` for a file that is something else than `wanted` by its first bytes."""
    with path.open("rb") as file:
        head, text = file.read(HEAD), ""
    kind, advice = kind_of(head, KINDS)
    if head.startswith(b"PK"):
        kind, advice = _archive(path)
    if kind and kind != wanted:
        raise UserError(f"{path} is {kind}: {advice}")
    with suppress(UnicodeDecodeError):
        text = getincrementaldecoder("utf-8")().decode(head).strip()  # it may end in the middle of a character
    if not kind and text and all(c.isprintable() or c in "\r\n\t" for c in text):
        raise UserError(f"{path} is a text file that begins {text.splitlines()[0][:40]!r}, not a file of weights")


def _archive(path: Path) -> tuple[str, str]:
    """What a ZIP archive is, and what to do where something else was expected."""
    try:
        names = zipfile.ZipFile(path).namelist()
    except zipfile.BadZipFile:  # cut off: its list of contents is at the end
        names = ["data.pkl"]
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive, which holds a program", "save the weights alone: module.state_dict()"
    if any(name.endswith("data.pkl") for name in names):
        return PYTORCH, "give it a name that ends in .pt"
    return "a ZIP archive that torch.save did not write", UNPACK


def read_pickle(path: Path) -> Any:
    """The content of a PyTorch file, or of any pickle: tensors, plain values and containers; objects as dicts.

    A module in it is given as its state dict. A folder is a checkpoint in shards, of which the weights are read, not
    the optimizer.

    Raises:
        UserError: if it names something that may act (nothing is run), is something else, or is damaged.
    """
    if path.is_dir():
        return _read_shards(path)
    _check_kind(path, PYTORCH)
    try:
        return load_pickle(path, archive=zipfile.is_zipfile(path))
    except NotPlainError as error:
        raise UserError(
            f"{path} wants to run {error} while it is opened; it was refused and nothing was run: where it comes "
            "from, save the state dict alone"
        ) from error
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle end in whatever the reader runs into
        raise _damaged(path, error) from error


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
        warnings.simplefilter("ignore")  # it warns that a single process reads all shards
        load({"state_dict": state}, checkpoint_id=folder, no_dist=True)
    return {**read_pickle(folder / "meta.pt"), "state_dict": state}
