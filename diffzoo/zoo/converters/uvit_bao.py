"""The official layout of U-ViT (github.com/baofff/U-ViT): its state dict.

A renaming without arithmetic.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.zoo.converters.renaming import Renaming, on_meta

__all__ = ["from_official", "to_official"]

_RULES = [
    (r"^patch\.", "patch_embed.proj."),
    (r"^time_mlp\.", "time_embed."),
    (r"^class_table\.", "label_emb."),
    (r"^text_in\.", "context_embed."),
    (r"^positions$", "pos_embed"),
    (r"^head\.", "decoder_pred."),
    (r"^smooth\.", "final_layer."),
]
_BLOCK_RULES = [
    (r"^attention_norm\.", "norm1."),
    (r"^mlp_norm\.", "norm2."),
    (r"^attention\.out\.", "attn.proj."),
    (r"^attention\.qkv\.", "attn.qkv."),
    (r"^mlp\.hidden\.", "mlp.fc1."),
    (r"^mlp\.out\.", "mlp.fc2."),
]


def _first_match(rules: list[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name, hits = re.subn(pattern, replacement, name)
        if hits:
            break
    return name


def _official_name(ours: str, half: int) -> str:
    skip = re.fullmatch(r"skips\.(\d+)\.(.+)", ours)
    if skip:
        return f"out_blocks.{skip[1]}.skip_linear.{skip[2]}"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    if not block:
        return _first_match(_RULES, ours)
    i, rest = int(block[1]), _first_match(_BLOCK_RULES, block[2])
    if i < half:
        return f"in_blocks.{i}.{rest}"
    return f"mid_block.{rest}" if i == half else f"out_blocks.{i - half - 1}.{rest}"


@lru_cache(maxsize=16)
def _renaming(config: UViTBaoConfig) -> Renaming:
    if config.norm != UViTBaoConfig.norm:  # the default
        raise UserError(f"the official U-ViT has layer norm alone, got a config with norm {config.norm!r}")
    return Renaming(on_meta(lambda: UViTBao(config)), lambda name: _official_name(name, config.depth // 2), "U-ViT")


def from_official(state: Mapping[str, Tensor], config: UViTBaoConfig) -> dict[str, Tensor]:
    """An official state dict under our names; the tensors are the same objects.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    return _renaming(config).from_official(state)


def to_official(state: Mapping[str, Tensor], config: UViTBaoConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return _renaming(config).to_official(state)
