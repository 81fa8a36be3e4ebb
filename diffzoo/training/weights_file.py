"""Weights as a file in our published form, written by a run: `diffzoo.zoo.load_any` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffzoo.files import atomic_path, write_text
from diffzoo.hub import explain_disk

__all__ = ["write_weights"]


def write_weights(state: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path) -> Path:
    """Write a safetensors file with the facts in its header, and `config.json` beside it.

    Args:
        state: tensors by name.
        facts: JSON-ready; what `diffzoo.zoo.Metadata` holds.
        path: of the file; its folder is made if needed.
    """
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with explain_disk(path), atomic_path(path) as temporary:
        save_file(tensors, temporary, {"diffzoo": json.dumps(dict(metadata), sort_keys=True)})
    write_text(path.parent / "config.json", json.dumps(dict(metadata), indent=1, sort_keys=True) + "\n")
    return path
