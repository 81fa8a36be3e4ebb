"""Low-rank adapters (arXiv:2106.09685) as tensors: their names, what they belong to, and how they are merged.

Beside the weight W of a linear layer `x` lie `x.lora_A.weight` `(rank, in)` and `x.lora_B.weight` `(out, rank)`; the
layer computes with

    (1)  W + scale * B A,    scale = alpha / rank.

Other tensors of an adapter are parameters that were trained whole, under their own names.
"""

from collections.abc import Mapping

from torch import Tensor

from diffzoo.errors import UserError

__all__ = ["merge", "plain_name"]

A, B = ".lora_A.weight", ".lora_B.weight"


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts into it and around it."""
    name = name.removeprefix("network.").replace(".base_layer.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def merge(state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, where: str) -> dict[str, Tensor]:
    """The state dict of a network with an adapter in it — (1).

    Args:
        state: of the network that the adapter belongs to.
        adapter: by plain names.
        scale: of the product.
        where: of the adapter, for messages.

    Raises:
        UserError: for a tensor that the network has no place for, or of another shape.
    """
    merged = dict(state)
    for name, tensor in adapter.items():
        if name.endswith(B):
            continue
        weight = name.removesuffix(A) + ".weight" if name.endswith(A) else name
        if weight not in state:
            raise UserError(f"the adapter in {where} has {name}, for which this network has no place")
        old = state[weight]
        new = scale * (adapter[name.removesuffix(A) + B].float() @ tensor.float()) if weight != name else tensor
        if new.shape != old.shape:
            raise UserError(f"{name} of the adapter in {where} does not fit {weight} of {tuple(old.shape)}")
        merged[weight] = (new if weight == name else old.float() + new).to(old.dtype)
    return merged
