"""ADM's released files (openai/guided-diffusion, MIT): their tensors to ours and back.

The files are plain state dicts. The two layouts differ in names, in 1x1 kernels over positions (theirs are `(out, in,
1)` convolutions, ours are linear layers) and in the classifier's table of positions (theirs is channels first). No
value is changed; in particular the layout of the qkv channels stays as it is and is a fact of the config.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.adm import ADMClassifier, ADMClassifierConfig, ADMConfig, ADMEncoderConfig, ADMUNet
from diffzoo.zoo.converters.renaming import converters

__all__ = ["from_official", "to_official"]

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_TABLE = "out.2.positional_embedding"
_POINTWISE = (".qkv.weight", ".proj_out.weight", ".qkv_proj.weight", ".c_proj.weight")  # convolutions over positions


def _part(names: Mapping[str, str], ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in names.items())


def _down(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 1
    for i, level in enumerate(config.levels):
        for j in range(level.depth):
            yield from _part(_RESIDUAL, f"down.{i}.blocks.{j}", f"input_blocks.{n}.0")
            yield from _part(_ATTENTION, f"down.{i}.attentions.{j}", f"input_blocks.{n}.1")
            n += 1
        yield from _part(_RESIDUAL, f"down.{i}.resample", f"input_blocks.{n}.0")
        yield f"down.{i}.resample.conv", f"input_blocks.{n}.0.op"
        n += 1


def _up(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 0
    for i, level in reversed(list(enumerate(config.levels))):
        for j in range(level.depth + 1):
            yield from _part(_RESIDUAL, f"up.{i}.blocks.{j}", f"output_blocks.{n}.0")
            yield from _part(_ATTENTION, f"up.{i}.attentions.{j}", f"output_blocks.{n}.1")
            n += 1
        last = f"output_blocks.{n - 1}.{2 if level.attention else 1}"
        yield from _part(_RESIDUAL, f"up.{i}.resample", last)
        yield f"up.{i}.resample.conv", f"{last}.conv"


@lru_cache(maxsize=32)
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
    names.update(_part(_RESIDUAL, "middle.block1", "middle_block.0"))
    names.update(_part(_ATTENTION, "middle.attention", "middle_block.1"))
    names.update(_part(_RESIDUAL, "middle.block2", "middle_block.2"))
    names.update(_up(config))
    return names


def _official_name(ours: str, config: ADMEncoderConfig) -> str:
    if config.norm != ADMEncoderConfig.norm:  # the default
        raise UserError(f"the official networks have group norm alone, got a config with norm {config.norm!r}")
    module, _, leaf = ours.rpartition(".")
    return _TABLE if ours == "pool.position" else f"{_modules(config)[module]}.{leaf}"


def _network(config: ADMEncoderConfig) -> ADMClassifier | ADMUNet:
    if isinstance(config, ADMClassifierConfig):
        return ADMClassifier(config)
    assert isinstance(config, ADMConfig)
    return ADMUNet(config)


_from_names, _to_names = converters(_network, _official_name, "ADM")


def from_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """Their state dict as ours.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    flat = {k: v.squeeze(-1) if k.endswith(_POINTWISE) and v.ndim == 3 else v for k, v in state.items()}
    if _TABLE in flat:
        flat[_TABLE] = flat[_TABLE].T.contiguous()
    return _from_names(flat, config)


def to_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`: our state dict under their names, loadable by their code."""
    official = _to_names(state, config)
    if _TABLE in official:
        official[_TABLE] = official[_TABLE].T.contiguous()
    return {k: v[..., None] if k.endswith(_POINTWISE) else v for k, v in official.items()}
