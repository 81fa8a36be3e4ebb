"""The official layout of DiMR (github.com/qihao067/DiMR): its state dict.

A renaming without arithmetic; the official gate parameters are stored as ours are (slope minus one).
"""

import re

from diffzoo.models.dimr import DiMR, DiMRConfig
from diffzoo.zoo.converters.renaming import Rules, converters, renamed

__all__ = ["from_official", "to_official"]

# ours to official, tried in order on the part below stages.N
_RULES: Rules = [
    (r"^unused_row$", "pos_emb.freqs_h"),
    (r"^unused_column$", "pos_emb.freqs_w"),
    (r"^patch\.", "input_layer.1."),
    (r"^positions$", "input_layer.3.position_embeddings.weight"),
    (r"^class_table\.", "class_embeds."),
    (r"^upsample\.norm_in\.", "upsample.0."),
    (r"^upsample\.expand\.", "upsample.1.kernel."),
    (r"^upsample\.norm_out\.", "upsample.2."),
    (r"^skips\.", "skip_denses."),
    (r"^head\.norm\.", "output_layer.0."),
    (r"^head\.conv\.", "output_layer.2."),
    (r"\.attention\.qkv\.", ".block1.query_key_value."),
    (r"\.attention\.text_kv\.", ".block1.condition_key_value."),
    (r"\.attention\.out\.", ".block1.dense."),
    (r"\.attention\.rotary\.log_frequencies_row$", ".block1.pos_emb.freqs_h"),
    (r"\.attention\.rotary\.log_frequencies_column$", ".block1.pos_emb.freqs_w"),
    (r"\.attention\.qk_norm\.log_scale$", ".block1.qk_norm.scale"),
    (r"\.attention\.norm\.", ".block1.norm."),
    (r"^(blocks\.\d+)\.conv\.", r"\1.block1.1."),
    (r"\.mlp\.norm\.", ".block2.norm."),
    (r"\.mlp\.gate\.", ".block2.w0."),
    (r"\.mlp\.value\.", ".block2.w1."),
    (r"\.mlp\.out\.", ".block2.w2."),
]
_GATE_RULES: Rules = [
    (r"\.high$", ".param0"),
    (r"\.low$", ".param1"),
    (r"\.slope$", ".nodecay_weight"),
    (r"\.shift$", ".nodecay_bias"),
]


def _official_name(ours: str, config: DiMRConfig) -> str:
    prefix, rest = re.fullmatch(r"(stages\.\d+\.)(.+)", ours).groups()  # type: ignore[union-attr]
    return prefix + renamed(renamed(rest, _RULES), _GATE_RULES)


from_official, to_official = converters(DiMR, _official_name, "DiMR")
