"""The official layout of U-ViT (github.com/baofff/U-ViT): its state dict.

A renaming without arithmetic.
"""

import re

from diffzoo.errors import UserError
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.zoo.converters.renaming import Rules, converters, renamed

__all__ = ["from_official", "to_official"]

_RULES: Rules = [
    (r"^patch\.", "patch_embed.proj."),
    (r"^time_mlp\.", "time_embed."),
    (r"^class_table\.", "label_emb."),
    (r"^text_in\.", "context_embed."),
    (r"^positions$", "pos_embed"),
    (r"^head\.", "decoder_pred."),
    (r"^smooth\.", "final_layer."),
]
_BLOCK_RULES: Rules = [
    (r"^attention_norm\.", "norm1."),
    (r"^mlp_norm\.", "norm2."),
    (r"^attention\.out\.", "attn.proj."),
    (r"^attention\.qkv\.", "attn.qkv."),
    (r"^mlp\.hidden\.", "mlp.fc1."),
    (r"^mlp\.out\.", "mlp.fc2."),
]


def _official_name(ours: str, config: UViTBaoConfig) -> str:
    if config.norm != UViTBaoConfig.norm:  # the default
        raise UserError(f"the official U-ViT has layer norm alone, got a config with norm {config.norm!r}")
    skip = re.fullmatch(r"skips\.(\d+)\.(.+)", ours)
    if skip:
        return f"out_blocks.{skip[1]}.skip_linear.{skip[2]}"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    if not block:
        return renamed(ours, _RULES)
    i, half, rest = int(block[1]), config.depth // 2, renamed(block[2], _BLOCK_RULES)
    if i < half:
        return f"in_blocks.{i}.{rest}"
    return f"mid_block.{rest}" if i == half else f"out_blocks.{i - half - 1}.{rest}"


from_official, to_official = converters(UViTBao, _official_name, "U-ViT")
