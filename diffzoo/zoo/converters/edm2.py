"""The official state of EDM2 (arXiv:2312.02696): names of blocks by resolution, attention as 1x1 convolutions.

A renaming, except that files in half precision are widened, since the weights are normalised in float32, and that
classes are rows of a table here and columns of a linear layer there.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from diffzoo.models.edm2 import EDM2Config, EDM2UNet
from diffzoo.zoo.converters.renaming import converters

__all__ = ["from_official", "to_official"]

_TOP = {
    "gain_out": "unet.out_gain",
    "noise_features.frequencies": "unet.emb_fourier.freqs",
    "noise_features.phases": "unet.emb_fourier.phases",
    "noise.weight": "unet.emb_noise.weight",
    "classes.weight": "unet.emb_label.weight",
    "conv_out.weight": "unet.out_conv.weight",
    "uncertainty_features.frequencies": "logvar_fourier.freqs",
    "uncertainty_features.phases": "logvar_fourier.phases",
    "uncertainty.weight": "logvar_linear.weight",
}
_BLOCK = {
    "embedding_gain": "emb_gain",
    "conv1.weight": "conv_res0.weight",
    "embedding.weight": "emb_linear.weight",
    "conv2.weight": "conv_res1.weight",
    "skip.weight": "conv_skip.weight",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.out.weight": "attn_proj.weight",
}
_CLASSES = "unet.emb_label.weight"
_POINTWISE = ("attn_qkv.weight", "attn_proj.weight")


def _encoder(config: EDM2Config) -> Iterator[str]:
    for i, level in enumerate(config.levels):
        size = f"{level.resolution}x{level.resolution}"
        if i:
            yield f"{size}_down"
        yield from (f"{size}_block{j}" for j in range(level.depth))


def _decoder(config: EDM2Config) -> Iterator[str]:
    for i, level in enumerate(reversed(config.levels)):
        size = f"{level.resolution}x{level.resolution}"
        yield from (f"{size}_up",) if i else (f"{size}_in0", f"{size}_in1")
        yield from (f"{size}_block{j}" for j in range(level.depth + 1))


@lru_cache(maxsize=16)
def _names(config: EDM2Config) -> dict[str, str]:
    size = config.levels[0].resolution
    names = {**_TOP, "conv_in.weight": f"unet.enc.{size}x{size}_conv.weight"}
    for ours, theirs, blocks in (("encoder", "enc", _encoder(config)), ("decoder", "dec", _decoder(config))):
        for i, block in enumerate(blocks):
            names.update({f"{ours}.{i}.{a}": f"unet.{theirs}.{block}.{b}" for a, b in _BLOCK.items()})
    return names


_from_names, _to_names = converters(EDM2UNet, lambda ours, config: _names(config)[ours], "EDM2")


def from_official(state: Mapping[str, Tensor], config: EDM2Config) -> dict[str, Tensor]:
    """An official state dict under our names.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    flat = {k: v[..., 0, 0] if k.endswith(_POINTWISE) and v.ndim == 4 else v for k, v in state.items()}
    if _CLASSES in flat:
        flat[_CLASSES] = flat[_CLASSES].T.contiguous()
    return {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in _from_names(flat, config).items()}


def to_official(state: Mapping[str, Tensor], config: EDM2Config) -> dict[str, Tensor]:
    """The inverse of `from_official`, in the precision of the state."""
    official = _to_names(state, config)
    if _CLASSES in official:
        official[_CLASSES] = official[_CLASSES].T
    return {k: v[..., None, None] if k.endswith(_POINTWISE) else v for k, v in official.items()}
