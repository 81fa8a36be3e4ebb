"""ADM's released files (openai/guided-diffusion, MIT): their tensors to ours and back.

The files are plain state dicts. The two layouts differ in names, in 1x1 kernels over positions (theirs are `(out, in,
1)` convolutions, ours are linear layers) and in the classifier's table of positions (theirs is channels first). No
value is changed; in particular the layout of the qkv channels stays as it is and is a fact of the config.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.adm import ADMClassifier, ADMClassifierConfig, ADMEncoderConfig, ADMUNet
from diffzoo.zoo.converters.renaming import check_tensors

__all__ = ["from_official", "to_official"]

# -- names

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_TABLES = {"pool.position": "out.2.positional_embedding"}
_POINTWISE = ("qkv", "proj_out", "qkv_proj", "c_proj")  # their convolutions over positions


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESIDUAL.items())


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _ATTENTION.items())


def _down(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 1
    for i, level in enumerate(config.levels):
        for j in range(level.depth):
            yield from _residual(f"down.{i}.blocks.{j}", f"input_blocks.{n}.0")
            yield from _attention(f"down.{i}.attentions.{j}", f"input_blocks.{n}.1")
            n += 1
        yield from _residual(f"down.{i}.resample", f"input_blocks.{n}.0")
        yield f"down.{i}.resample.conv", f"input_blocks.{n}.0.op"
        n += 1


def _up(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 0
    for i, level in reversed(list(enumerate(config.levels))):
        for j in range(level.depth + 1):
            yield from _residual(f"up.{i}.blocks.{j}", f"output_blocks.{n}.0")
            yield from _attention(f"up.{i}.attentions.{j}", f"output_blocks.{n}.1")
            n += 1
        last = f"output_blocks.{n - 1}.{2 if level.attention else 1}"
        yield from _residual(f"up.{i}.resample", last)
        yield f"up.{i}.resample.conv", f"{last}.conv"


def _modules(config: ADMEncoderConfig) -> dict[str, str]:
    """Our module names to theirs, with a few that this config does not have."""
    names = {
        "time.linear1": "time_embed.0",
        "time.linear2": "time_embed.2",
        "classes": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "pool.qkv": "out.2.qkv_proj",
        "pool.out": "out.2.c_proj",
    }
    names.update(_down(config))
    names.update(_residual("middle.block1", "middle_block.0"))
    names.update(_attention("middle.attention", "middle_block.1"))
    names.update(_residual("middle.block2", "middle_block.2"))
    names.update(_up(config))
    return names


@lru_cache(maxsize=32)
def _layout(config: ADMEncoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our tensor names to theirs and the shapes theirs have."""
    if config.norm != ADMEncoderConfig.norm:  # the default
        raise UserError(f"the official networks have group norm alone, got a config with norm {config.norm!r}")
    with torch.device("meta"):
        network = ADMClassifier(config) if isinstance(config, ADMClassifierConfig) else ADMUNet(config)  # type: ignore[arg-type]
    modules = _modules(config)
    layout = {}
    for name, tensor in network.state_dict().items():
        module, _, leaf = name.rpartition(".")
        theirs = _TABLES.get(name) or f"{modules[module]}.{leaf}"
        layout[name] = (theirs, tuple(_to_theirs(theirs, tensor).shape))
    return layout


# -- tensors


def _pointwise(theirs: str) -> bool:
    return theirs.endswith(".weight") and theirs.split(".")[-2] in _POINTWISE


def _to_theirs(theirs: str, tensor: Tensor) -> Tensor:
    if _pointwise(theirs):
        return tensor[..., None]
    return tensor.T.contiguous() if theirs in _TABLES.values() else tensor


def _to_ours(theirs: str, tensor: Tensor) -> Tensor:
    if _pointwise(theirs):
        return tensor[..., 0]
    return tensor.T.contiguous() if theirs in _TABLES.values() else tensor


def from_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """Their state dict as ours.

    Args:
        state: a released file's content.
        config: the network that it is meant for.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    layout = _layout(config)
    check_tensors(state, dict(layout.values()), "official ADM weights")
    return {ours: _to_ours(theirs, state[theirs]) for ours, (theirs, _) in layout.items()}


def to_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`: our state dict under their names, loadable by their code."""
    layout = _layout(config)
    official = {theirs: _to_theirs(theirs, state[ours]) for ours, (theirs, _) in layout.items() if ours in state}
    check_tensors(official | {k: v for k, v in state.items() if k not in layout}, dict(layout.values()), "ADM weights")
    return official
