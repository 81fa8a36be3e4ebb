"""Named tensors: their hash, casts that lose no range, and the one way to write them to a safetensors file.

A hash that was recorded in a file is compared for ever, so every kind of record keeps the form that it began with:

    STATE           weights of networks in the results of evaluations
    ADAPTER_BASE    `base_sha256` of a low-rank adapter: the frozen parameters, as float32
    TEXT_ENCODER    weights in the fingerprint of a text encoder, which names its folder of cached embeddings
    AUTOENCODER     weights in the hash of an autoencoder, as float32, which a latent cache states
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffzoo.cache import explain_disk
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import atomic_path

__all__ = [
    "ADAPTER_BASE",
    "AUTOENCODER",
    "STATE",
    "TEXT_ENCODER",
    "HashForm",
    "cast",
    "check_tensors",
    "state_sha256",
    "write_tensors",
]


class HashForm(NamedTuple):
    """What of a tensor is hashed: the text `head` about it, then its bytes, of float32 if `float32`."""

    head: str
    float32: bool = False


STATE = HashForm("{name}:{dtype}:{shape}\n")
ADAPTER_BASE = HashForm("{name}", float32=True)
TEXT_ENCODER = HashForm("{name} {dtype} {shape}")
AUTOENCODER = HashForm("{name}{shape}", float32=True)


def state_sha256(state: Mapping[str, Tensor], form: HashForm = STATE, start: bytes = b"") -> str:
    """SHA-256 of tensors in the order of their names, 64 hexadecimal digits: independent of file format and device.

    Args:
        state: of any shapes and dtypes. Batch norm's `num_batches_tracked`, on which no result depends, is left out.
        form: what is hashed of each tensor.
        start: what is hashed before the first one.
    """
    digest = hashlib.sha256(start)
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        value = state[name].detach()
        value = (value.float() if form.float32 else value).cpu().contiguous()
        digest.update(form.head.format(name=name, dtype=value.dtype, shape=tuple(value.shape)).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise a `UserError` unless a state dict has exactly the names and shapes of `wanted`; `what` begins it."""
    unknown, missing = sorted(state.keys() - wanted.keys()), sorted(wanted.keys() - state.keys())
    if unknown:
        raise UserError(f"{what}: unknown {_some(unknown)}{did_you_mean(unknown[0], missing)}")
    if missing:
        raise UserError(f"{what}: missing {_some(missing)}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{what}: {name} has shape {tuple(tensor.shape)}, this config needs {wanted[name]}")


def _some(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def cast(name: str, value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """A tensor of floating-point numbers in another type; tensors of other kinds stay as they are.

    The range is checked before the cast. After it, it is too late: float8_e4m3fn has no infinity, and torch gives its
    largest number, 448, for whatever is larger, infinity included.

    Args:
        name: of the tensor, for the message.
        value: any shape.
        dtype: of the result.
        where: what holds the tensor, for the message.

    Raises:
        UserError: for values that are not finite, or larger than the type holds.
    """
    if not value.is_floating_point() or not value.numel():
        return value
    wide = value if value.element_size() > 1 else value.float()  # torch cannot ask float8 whether it is finite
    if not wide.isfinite().all():
        raise UserError(f"{name} of {where} is not finite")
    largest, most = float(wide.abs().max()), torch.finfo(dtype).max
    if largest > most:
        raise UserError(f"{name} of {where} reaches {largest:.4g}, and {dtype} ends at {most:.4g}: use bf16 or fp32")
    return value.to(dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all; equal input gives equal bytes.

    Args:
        path: of the file; its folder is made.
        tensors: on any device; they may be views and may share memory.
        metadata: text by name, for the file's header. With more than one name, their order is safetensors' own.

    Raises:
        UserError: if the disk is full or may not be written to.
    """
    from safetensors.torch import save_file

    whole: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in held:  # safetensors refuses shared memory
            value = value.clone()
        held.add(value.untyped_storage().data_ptr())
        whole[name] = value
    with explain_disk(path), atomic_path(path) as temporary:
        save_file(whole, temporary, dict(metadata) if metadata else None)
    return path
