"""Our published form on disk: the one writer of weights with what is known about them.

model.safetensors   the weights; the metadata of `config.json` also in its header, under "diffzoo"
adapter.safetensors in place of these: low-rank adapters, whose metadata names the weights that they belong to
config.json         the metadata (`diffzoo.zoo.metadata`)
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from torch import Tensor

from diffzoo.cache import explain_disk
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import to_json, write_text
from diffzoo.models.base import Network
from diffzoo.process import GaussianProcess
from diffzoo.record import from_plain
from diffzoo.tensors import write_tensors
from diffzoo.zoo.metadata import Metadata, metadata_of

__all__ = ["save_pretrained", "save_weights", "write_model"]


def save_weights(state: Mapping[str, Tensor], metadata: Metadata, path: Path) -> Path:
    """Write a safetensors file with the metadata in its header, atomically; equal input gives equal bytes."""
    return write_tensors(path, state, {"diffzoo": json.dumps(metadata.to_plain(), sort_keys=True)})


def write_model(state: Mapping[str, Tensor], metadata: Metadata, folder: Path) -> Path:
    """Write weights, or low-rank adapters, and `config.json` to a folder; returns the file of weights."""
    path = folder / ("model.safetensors" if metadata.adapter is None else "adapter.safetensors")
    save_weights(state, metadata, path)
    with explain_disk(folder):
        write_text(folder / "config.json", to_json(metadata.to_plain()))
    return path


def save_pretrained(
    network: Network,
    folder: str | Path,
    *,
    process: GaussianProcess | None = None,
    metadata: Metadata | None = None,
    **more: object,
) -> Path:
    """Write a network to a folder as `model.safetensors` and `config.json`; `load_any(folder)` reads it back.

    Args:
        network: any network of the zoo.
        folder: made if needed.
        process: what it was trained with; default: that of the weights it was loaded from.
        metadata: all that is known at once; default: that of the weights it was loaded from.
        more: single fields of `Metadata`, such as `class_names` or `licence`.

    Returns:
        the folder.
    """
    folder = Path(folder)
    known = metadata_of(network) if metadata is None else replace(metadata, config=network.config)
    hints = get_type_hints(Metadata)
    for name in more:
        if name not in hints:
            raise UserError(f"metadata has no field {name!r}{did_you_mean(name, hints)}")
    given = {name: from_plain(hints[name], value, name) for name, value in more.items()}
    known = replace(known, process=process or known.process, **given)
    write_model(network.state_dict(), known, folder)
    return folder
