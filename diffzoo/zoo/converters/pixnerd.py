"""The official state of PixNerd (arXiv:2507.23268): transformer and pixel blocks in one list, a gated MLP in two parts.

Patches are embedded by a linear layer there and by a convolution here; the two halves of the MLP's first layer are one
layer here. Everything else is a renaming.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from diffzoo.models.pixnerd import PixNerd, PixNerdConfig
from diffzoo.zoo.converters.renaming import Renaming, on_meta

__all__ = ["from_official", "to_official"]

_RULES = [
    (r"^time\.linear1\.", "t_embedder.mlp.0."),
    (r"^time\.linear2\.", "t_embedder.mlp.2."),
    (r"^classes\.", "y_embedder.embedding_table."),
    (r"^embed\.conv\.", "s_embedder.proj."),
    (r"^pixel_embed\.", "x_embedder.embedder.0."),
    (r"^norm_out\.", "final_layer.norm."),
    (r"^out\.", "final_layer.linear."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.norm_([qk])\.", r".attn.\1_norm."),
    (r"\.mlp\.hidden\.", ".mlp.w1."),
    (r"\.mlp\.out\.", ".mlp.w2."),
    (r"\.modulation\.linear\.", ".adaLN_modulation.0."),
]


def _official_name(ours: str, config: PixNerdConfig) -> str:
    pixel = re.fullmatch(r"pixel_blocks\.(\d+)\.(.+)", ours)
    if pixel:
        return f"blocks.{config.depth + int(pixel[1])}.{pixel[2].replace('weights.', 'param_generator1.0.')}"
    for pattern, replacement in _RULES:
        ours = re.sub(pattern, replacement, ours)
    return ours


@lru_cache(maxsize=16)
def _renaming(config: PixNerdConfig) -> Renaming:
    return Renaming(on_meta(lambda: PixNerd(config)), lambda name: _official_name(name, config), "PixNerd")


def from_official(state: Mapping[str, Tensor], config: PixNerdConfig) -> dict[str, Tensor]:
    """An official state dict under our names.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    flat = dict(state)
    for name in [k for k in flat if k.endswith(".mlp.w3.weight")]:
        first = name.replace("w3", "w1")
        if first in flat:
            flat[first] = torch.cat([flat[first], flat.pop(name)])
    kernel = flat.get("s_embedder.proj.weight")
    if kernel is not None and kernel.shape[1:] == (config.in_channels * config.patch**2,):
        flat["s_embedder.proj.weight"] = kernel.unflatten(1, (config.in_channels, config.patch, config.patch))
    return _renaming(config).from_official(flat)


def to_official(state: Mapping[str, Tensor], config: PixNerdConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    official = _renaming(config).to_official(state)
    for name in [k for k in official if k.endswith(".mlp.w1.weight")]:
        official[name], official[name.replace("w1", "w3")] = official[name].chunk(2)
    official["s_embedder.proj.weight"] = official["s_embedder.proj.weight"].flatten(1)
    return official
