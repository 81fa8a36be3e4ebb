"""The official layouts of DiT, SiT, REPA, JiT, LightningDiT and RAE's DiT-DH: their state dicts.

A renaming. Position tables and RoPE tables, which some files hold and others do not, are constants: they are left out
and made anew on the way back. REPA-E's statistics of its latents (`bn`) belong to its autoencoder and are left out.
Files may prefix every name by `net.` (JiT's training) or `transformer.` (its mirror).
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffzoo.models.dit import DiT, DiTConfig
from diffzoo.nn.embeddings import sine_cosine_table
from diffzoo.zoo.converters.renaming import Rules, converters, renamed

__all__ = ["from_official", "to_official"]

_CONSTANTS = re.compile(r"pos_embed|(enc_|dec_)?feat_rope(_incontext)?\.freqs_(cos|sin)|bn\.\w+")
_PREFIX = re.compile(r"^(net|transformer)\.")
_RULES: Rules = [
    (r"^time\.frequencies$", "t_embedder.W"),
    (r"^time\.linear1\.", "t_embedder.mlp.0."),
    (r"^time\.linear2\.", "t_embedder.mlp.2."),
    (r"^classes\.", "y_embedder.embedding_table."),
    (r"^context$", "in_context_posemb"),
    (r"^head_project\.", "s_projector."),
    (r"^projector\.", "projectors.0."),
    (r"^norm_out\.", "final_layer.norm_final."),
    (r"^modulation_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^out\.", "final_layer.linear."),
]
_BLOCK_RULES: Rules = [
    (r"^attention\.qkv\.", "attn.qkv."),
    (r"^attention\.out\.", "attn.proj."),
    (r"^attention\.norm_([qk])\.", r"attn.\1_norm."),
    (r"^modulation\.linear\.", "adaLN_modulation.1."),
]
_MLP = {"gelu": ("fc1", "fc2"), "swiglu": ("w12", "w3")}


def _official_name(ours: str, config: DiTConfig) -> str:
    block = re.fullmatch(r"(blocks|head)\.(\d+)\.(.+)", ours)
    if block:
        number = int(block[2]) + (config.depth if block[1] == "head" else 0)
        first, last = _MLP[config.mlp]
        rules = [*_BLOCK_RULES, (r"^mlp\.hidden\.", f"mlp.{first}."), (r"^mlp\.out\.", f"mlp.{last}.")]
        return f"blocks.{number}.{renamed(block[3], rules)}"
    deep = "s_embedder" if config.head_depth else "x_embedder"
    first = "proj1" if config.bottleneck else "proj"
    embeds = [(r"^embed\.conv\.", f"{deep}.{first}."), (r"^embed\.project\.", f"{deep}.proj2."),
              (r"^head_embed\.conv\.", "x_embedder.proj.")]  # fmt: skip
    return renamed(ours, [*embeds, *_RULES])


_from_names, _to_names = converters(DiT, _official_name, "DiT")


def from_official(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """An official state dict under our names; a projector that the config does not have is left out.

    Raises:
        UserError: for unknown or missing names and for wrong shapes, naming them.
    """
    plain = {_PREFIX.sub("", k): v for k, v in state.items()}
    spare = "projectors." if not config.projector_width else "net."
    kept = {k: v for k, v in plain.items() if not _CONSTANTS.fullmatch(k) and not k.startswith(spare)}
    return _from_names(kept, config)


def to_official(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, with the position table (and without tables of RoPE and prefixes)."""
    table = sine_cosine_table(*config.grid, config.width)
    return {"pos_embed": table[None], **_to_names(state, config)}
