"""The official state of PixNerd (arXiv:2507.23268): transformer and pixel blocks in one list, a gated MLP in two parts.

Patches are embedded by a linear layer there and by a convolution here; the two halves of the MLP's first layer are one
layer here. Everything else is a renaming.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from diffzoo.models.pixnerd import PixNerd, PixNerdConfig
from diffzoo.zoo.converters.renaming import Rules, converters

__all__ = ["from_official", "to_official"]

_RULES: Rules = [
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


_from_names, _to_names = converters(PixNerd, _official_name, "PixNerd")


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
    return _from_names(flat, config)


def to_official(state: Mapping[str, Tensor], config: PixNerdConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    official = _to_names(state, config)
    for name in [k for k in official if k.endswith(".mlp.w1.weight")]:
        official[name], official[name.replace("w1", "w3")] = official[name].chunk(2)
    official["s_embedder.proj.weight"] = official["s_embedder.proj.weight"].flatten(1)
    return official
