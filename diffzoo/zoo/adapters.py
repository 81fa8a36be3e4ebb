"""Low-rank adapters as a source of weights: found, joined to the weights they belong to, without `peft`.

They lie in `adapter.safetensors`, or in a checkpoint of a run with LoRA, as `diffzoo.models.adapters` names them. Their
facts have a field `adapter`:

    base         source of the weights that it belongs to       rank, alpha    of the product, scaled by alpha / rank
    base_sha256  of these weights (`diffzoo.tensors.ADAPTER_BASE`)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.adapters import merge, plain_name
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.zoo import formats
from diffzoo.zoo.adapt import adapt_to
from diffzoo.zoo.loading import Weights, file_metadata, folder_file, locate
from diffzoo.zoo.manifest import has_checkpoint
from diffzoo.zoo.metadata import Metadata

__all__ = ["adapter_tensors", "find_adapter", "join", "portable_base", "read_adapter"]


def adapter_tensors(data: Mapping[str, Any], prefer: str, where: str) -> tuple[dict[str, Tensor], str]:
    """The trained tensors in a checkpoint or file by plain name, and which they are.

    Args:
        data: a training checkpoint, or the tensors of an adapter file.
        prefer: "average", "raw" or the label of an average.
        where: for messages.

    Raises:
        UserError: for an unknown label.
    """
    state = data.get("state_dict", data)
    found = {plain_name(k): v for k, v in state.items() if isinstance(v, Tensor)}
    averages = formats.averages_in(data)
    if prefer not in ("average", "raw") and prefer not in averages:
        raise UserError(f"{where} holds no average {prefer!r}{did_you_mean(prefer, averages)}")
    if not averages or prefer == "raw":
        return found, "raw"
    label = next(iter(averages)) if prefer == "average" else prefer
    return found | {plain_name(k): v for k, v in averages[label].items()}, label


def read_adapter(
    path: Path, metadata: Metadata, prefer: str = "average", data: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors of an adapter's file or checkpoint, and its facts with their place.

    Args:
        path, facts, prefer: as for `adapter_tensors`.
        data: what is in the file, if it is read already.
    """
    if data is None:
        data = formats.read_tensors(path) if path.suffix == ".safetensors" else formats.read_pickle(path)
    tensors, place = adapter_tensors(data, prefer, str(path))
    provenance = {**metadata.provenance, "file": str(path), "weights": place}
    return tensors, replace(metadata, provenance=provenance)


def find_adapter(source: str | Path) -> tuple[Path, Metadata] | None:
    """The file behind a local source and its facts, if it holds adapters; None for whole weights and other sources."""
    path = Path(str(source).removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        path = folder_file(path)
    metadata = file_metadata(path) if path.is_file() else None
    return (path, metadata) if metadata is not None and metadata.adapter else None


def portable_base(metadata: Metadata, where: str) -> None:
    """Raise unless the weights that adapters belong to can be had elsewhere too."""
    base = str((metadata.adapter or {}).get("base"))
    if not base.startswith("hf-hub:") and not has_checkpoint(base):
        raise UserError(
            f"the adapters in {where} belong to {base}, which others do not have: publish that first and train from "
            "hf-hub:OWNER/NAME, or publish whole weights with --merge"
        )


def join(tensors: Mapping[str, Tensor], metadata: Metadata, where: str) -> Weights:
    """The weights that adapters belong to with the adapters merged in: `W + alpha / rank * B A`.

    Raises:
        UserError: if the base cannot be had, is not the one the adapters were trained on, or has other layers.
    """
    adapter = metadata.adapter or {}
    source = str(adapter.get("base"))
    try:
        base = locate(source)
    except UserError as error:
        raise UserError(
            f"the adapters in {where} belong to the weights {source}, which cannot be had: {error}"
        ) from error
    network = adapt_to(base, metadata.build_config())
    state = dict(network.state_dict())
    frozen = {n: p for n, p in network.named_parameters() if n not in tensors}
    if adapter.get("base_sha256") and state_sha256(frozen, ADAPTER_BASE) != adapter["base_sha256"]:
        raise UserError(
            f"the adapters in {where} were trained on other weights than {source} now holds: restore those, or name "
            "their place in the field base of config.json"
        )
    state = merge(state, tensors, float(adapter["alpha"]) / int(adapter["rank"]), where)
    provenance = {**metadata.provenance, "base": source, "base_provenance": base.metadata.provenance}
    return Weights(state, replace(metadata, adapter=None, provenance=provenance), where)
