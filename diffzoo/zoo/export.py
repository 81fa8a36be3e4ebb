"""One file of weights out of a run, small enough to ship.

    export("runs/emoji", "simple_uvit_xs_32.emoji.safetensors", dtype="bf16", licence="mit")

The file holds the EMA of the weights under our own names, with its metadata in the header, so it loads by its path
alone. Weights of 16 bits load as float32. `tools/manifest_entry.py` makes an entry for the manifest of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffzoo.cache import gigabytes
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import sha256
from diffzoo.record import from_plain
from diffzoo.sampling import Guidance
from diffzoo.tensors import cast
from diffzoo.zoo.licences import named_licence
from diffzoo.zoo.loading import locate
from diffzoo.zoo.publish import agreed_licence, published_provenance
from diffzoo.zoo.saving import save_weights

__all__ = ["DTYPES", "Exported", "export"]

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote.

    Args:
        path: of the file.
        size: bytes.
        sha256: of the file.
        weights: which weights these are and where they came from.
        largest_change: what rounding to `dtype` changed at most, relative to the largest weight of its tensor.
    """

    path: Path
    size: int
    sha256: str
    largest_change: float
    weights: str

    def __str__(self) -> str:
        change = f", rounding changed weights by at most {self.largest_change:.1e}" if self.largest_change else ""
        return f"{self.path}: {self.weights}; {gigabytes(self.size)}, sha256 {self.sha256}{change}"


def export(
    source: str | Path,
    path: str | Path,
    *,
    dtype: Dtype = "fp32",
    licence: str | None = None,
    weights: str = "ema",
    guidance: Guidance | Mapping[str, object] | None = None,
) -> Exported:
    """Write the weights of a run, a checkpoint or any other source to one safetensors file.

    Args:
        source: anything `load_any` reads.
        path: of the file, ending in `.safetensors`.
        dtype: of floating-point tensors in the file.
        licence: of the weights; required unless the source states one, which cannot be changed here.
        weights: which weights of a checkpoint: "ema", "raw" or the label of an EMA.
        guidance: that becomes the default when these weights are sampled.

    Raises:
        UserError: without a licence, or for weights that overflow the type.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise UserError(f"expected dtype fp32, bf16 or fp16, got {dtype!r}{did_you_mean(str(dtype), DTYPES)}")
    if path.suffix != ".safetensors":
        raise UserError(f"expected a file that ends in .safetensors, got {path}")
    found = locate(source, weights)
    licence = agreed_licence(named_licence(licence), found.metadata.licence, found.where)
    if not licence:
        raise UserError("weights need a licence before they are given away: say which, for example mit or cc-by-4.0")
    asked = from_plain(Guidance, guidance, "guidance") if guidance is not None else None
    state, change = _rounded(found.state, DTYPES[dtype], found.where)
    metadata = replace(
        found.metadata,
        licence=licence,
        guidance=asked or found.metadata.guidance,
        provenance=published_provenance(found.metadata.provenance),
    )
    save_weights(state, metadata, path)
    return Exported(path, path.stat().st_size, sha256(path), change, str(found.metadata.provenance))


def _rounded(state: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> tuple[dict[str, Tensor], float]:
    """The tensors in `dtype`, and the largest relative change."""
    rounded: dict[str, Tensor] = {}
    change = 0.0
    for name, value in state.items():
        rounded[name] = cast(name, value, dtype, where)
        if value.is_floating_point() and value.numel():
            scale = float(value.abs().max()) or 1.0
            change = max(change, float((rounded[name].double() - value.double()).abs().max()) / scale)
    return rounded, change
