"""The official layout of U-ViT (github.com/baofff/U-ViT): its config and its state dict.

A renaming without arithmetic.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.zoo.converters.renaming import Renaming, on_meta

__all__ = ["config_from_official", "from_official", "to_official"]

_FIELDS = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale",
           "mlp_time_embed", "num_classes", "clip_dim", "num_clip_token", "conv", "skip", "use_checkpoint",
           "name"}  # fmt: skip

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


def config_from_official(official: Mapping[str, Any], null_class: bool | None = None) -> UViTBaoConfig:
    """Our config for the official `nnet` dict.

    Args:
        official: the official network's arguments; the defaults of absent ones are the official ones.
        null_class: whether the last row of the official class table stands for "no class". Default: unless the table
            has 1000 rows, as for the ImageNet models without guidance.

    Raises:
        UserError: for a field that the official network does not have.
    """
    for name in official:
        if name not in _FIELDS:
            raise UserError(f"U-ViT config has no field {name!r}{did_you_mean(name, _FIELDS)}")
    rows = max(int(official.get("num_classes", -1)), 0)
    null = rows not in (0, 1000) if null_class is None else null_class
    return UViTBaoConfig(
        image_size=official.get("img_size", 224),
        in_channels=official.get("in_chans", 3),
        num_classes=rows - null if rows else 0,
        null_class=null,
        patch=official.get("patch_size", 16),
        width=official.get("embed_dim", 768),
        depth=official.get("depth", 12) // 2 * 2 + 1,
        heads=official.get("num_heads", 12),
        mlp_ratio=float(official.get("mlp_ratio", 4)),
        qkv_bias=bool(official.get("qkv_bias", False)),
        mlp_time_embed=bool(official.get("mlp_time_embed", False)),
        skip=bool(official.get("skip", True)),
        conv=bool(official.get("conv", True)),
        text_width=int(official.get("clip_dim", 0)),
        text_tokens=int(official.get("num_clip_token", 77)),
    )


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
