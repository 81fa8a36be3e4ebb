"""The official layout of DiMR (github.com/qihao067/DiMR): its config and its state dict.

A renaming without arithmetic; the official gate parameters are stored as ours are (slope minus one).
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.dimr import DiMR, DiMRConfig, DiMRStage
from diffzoo.zoo.converters.renaming import Renaming, on_meta

__all__ = ["config_from_official", "from_official", "to_official"]

_NORMS = {"LN": "td_ln", "RMSN": "rmsn", "TDRMSN": "td_rmsn", "ADARMSN": "ada_rmsn"}
_POSITIONS = {"APE": "learned", "Axial_RoPE": "axial_rope"}
_KINDS = {"TransformerBlock": "transformer", "ConvNeXtBlock": "convnext"}
_MODEL_FIELDS = {"channels", "num_classes", "block_grad_to_lowres", "norm_type", "pe_type", "condition_dim",
                 "stage_configs", "name"}  # fmt: skip
_STAGE_FIELDS = {"block_type", "dim", "hidden_dim", "num_attention_heads", "num_blocks", "kernel_size", "max_height",
                 "max_width", "image_input_ratio", "input_feature_ratio", "final_kernel_size",
                 "dropout_prob"}  # fmt: skip

# ours to official, tried in order on the part below stages.N
_RULES = [
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
_GATE_RULES = [
    (r"\.high$", ".param0"),
    (r"\.low$", ".param1"),
    (r"\.slope$", ".nodecay_weight"),
    (r"\.shift$", ".nodecay_bias"),
]


def config_from_official(official: Mapping[str, Any]) -> DiMRConfig:
    """Our config for the official `nnet` dict.

    The official class table counts the null class as its last row (1001 for ImageNet); an even `num_blocks` builds
    one block more.

    Raises:
        UserError: for a field or value that the official network does not have.
    """
    _check_fields(official, _MODEL_FIELDS, "DiMR config")
    rows = int(official.get("num_classes") or 0)
    stages = tuple(_stage(stage) for stage in official["stage_configs"])
    last = stages[-1]
    return DiMRConfig(
        image_size=max(last.grid) * last.ratio,
        in_channels=official["channels"],
        num_classes=max(rows - 1, 0),
        null_class=True,
        stages=stages,
        norm=_lookup(_NORMS, official.get("norm_type", "LN"), "norm_type"),
        positions=_lookup(_POSITIONS, official.get("pe_type", "APE"), "pe_type"),
        detach_features=bool(official.get("block_grad_to_lowres", False)),
        text_width=int(official.get("condition_dim") or 0),
    )


def _stage(official: Mapping[str, Any]) -> DiMRStage:
    _check_fields(official, _STAGE_FIELDS, "DiMR stage")
    return DiMRStage(
        kind=_lookup(_KINDS, official["block_type"], "block_type"),
        grid=(official["max_height"], official["max_width"]),
        width=official["dim"],
        hidden=official["hidden_dim"],
        depth=official["num_blocks"] // 2 * 2 + 1,
        image_ratio=official.get("image_input_ratio", 1),
        patch=official.get("input_feature_ratio", 1),
        heads=official.get("num_attention_heads", 1),
        kernel_size=official.get("kernel_size", 7),
        head_kernel_size=official["final_kernel_size"],
        dropout=float(official.get("dropout_prob", 0)),
    )


def _check_fields(given: Mapping[str, Any], known: set[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{what} has no field {name!r}{did_you_mean(name, known)}")


def _lookup(table: Mapping[str, Any], value: str, field: str) -> Any:
    if value not in table:
        raise UserError(f"unknown {field} {value!r}{did_you_mean(value, table)}")
    return table[value]


def _official_name(ours: str) -> str:
    prefix, rest = re.fullmatch(r"(stages\.\d+\.)(.+)", ours).groups()  # type: ignore[union-attr]
    for pattern, replacement in _RULES:
        rest, hits = re.subn(pattern, replacement, rest)
        if hits:
            break
    for pattern, replacement in _GATE_RULES:
        rest = re.sub(pattern, replacement, rest)
    return prefix + rest


@lru_cache(maxsize=8)
def _renaming(config: DiMRConfig) -> Renaming:
    return Renaming(on_meta(lambda: DiMR(config)), _official_name, "DiMR")


def from_official(state: Mapping[str, Tensor], config: DiMRConfig) -> dict[str, Tensor]:
    """An official state dict under our names; the tensors are the same objects.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    return _renaming(config).from_official(state)


def to_official(state: Mapping[str, Tensor], config: DiMRConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return _renaming(config).to_official(state)
