"""DiT in diffusers' layout (`DiTTransformer2DModel`): queries, keys and values apart, an embedding in every block.

The authors' tensors are cut there, not changed; each block's embeddings of time and class are copies of one another.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.dit import DiTConfig
from diffzoo.zoo.converters import dit

__all__ = ["from_official", "to_official"]

_EMBEDDING = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("to_q", "to_k", "to_v")


def _pairs(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, str]:
    """Names in the authors' layout by names here, of what is the same tensor in both."""
    names = dict(_TOP)
    for i in range(config.depth):
        names |= {f"transformer_blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK.items()}
        names |= {f"transformer_blocks.{i}.norm1.emb.{theirs}": ours for theirs, ours in _EMBEDDING.items()}
    return {f"{k}.{end}": f"{v}.{end}" for k, v in names.items() for end in ("weight", "bias") if f"{k}.{end}" in state}


def from_official(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """A state dict of diffusers under our names.

    Raises:
        UserError: for unknown or missing names, wrong shapes, and embeddings that differ from block to block.
    """
    left = {k: v for k, v in state.items() if k != "pos_embed.pos_embed"}
    official: dict[str, Tensor] = {}
    for theirs, name in _pairs(left, config).items():
        tensor = left.pop(theirs)
        if not torch.equal(official.setdefault(name, tensor), tensor):
            raise UserError(f"DiT weights of diffusers: {theirs} is not the same as in the first block")
    for i in range(config.depth):
        for end in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.{part}.{end}" for part in _QKV]
            if all(part in left for part in parts):
                official[f"blocks.{i}.attn.qkv.{end}"] = torch.cat([left.pop(part) for part in parts])
    return dit.from_official({**official, **left}, config)


def to_official(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, without the position table."""
    official = dit.to_official(state, config)
    every = {f"{k}.{end}": torch.empty(0) for k in [*_TOP] for end in ("weight", "bias")}
    for i in range(config.depth):
        parts = [*_BLOCK, *(f"norm1.emb.{k}" for k in _EMBEDDING)]
        every |= {f"transformer_blocks.{i}.{k}.{end}": torch.empty(0) for k in parts for end in ("weight", "bias")}
    found = {theirs: official[ours] for theirs, ours in _pairs(every, config).items() if ours in official}
    for i in range(config.depth):
        for end in ("weight", "bias"):
            qkv = official[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            found |= {f"transformer_blocks.{i}.attn1.{k}.{end}": v for k, v in zip(_QKV, qkv, strict=True)}
    return found
