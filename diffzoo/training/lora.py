"""Low-rank adapters (arXiv:2106.09685), put into a network by `peft`.

The network's own weights stay as they are; beside each of its `lora_targets` a product of two thin matrices is
learnt, `W x + alpha / rank * B A x`, with B zero at first. The class table, which new classes need, trains whole.
A checkpoint holds these tensors alone, and says which weights they belong to; `diffzoo.zoo.loading` reads them, and
joins them to those weights.
"""

import re
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.adapters import plain_name
from diffzoo.models.base import Network
from diffzoo.training.freezing import matching

__all__ = ["LoRA", "adapter_state", "inject"]


@dataclass(frozen=True)
class LoRA:
    """Which adapters a network gets.

    Args:
        rank: of the added matrices, at least 1.
        alpha: scale; the product is multiplied by alpha / rank. None = rank.
        dropout: probability on the adapters' input.
        targets: shell patterns that narrow the family's `lora_targets()`, such as `["*.attention.*"]`; None = all.
        train: shell patterns of further parameters that train whole, besides the class table.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None
    train: list[str] | None = None

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def inject(network: Network, lora: LoRA) -> list[str]:
    """Put adapters into a network and stop everything else but its class table from training; returns their places.

    Raises:
        UserError: without `peft`, for a rank below 1, for a family without places for adapters, or for patterns that
            name nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("low-rank adapters need peft: pip install 'diffzoo[lora]'") from error
    if lora.rank < 1:
        raise UserError(f"the rank of LoRA must be at least 1, got {lora.rank}")
    if not network.lora_targets():
        raise UserError(f"{type(network).__name__} takes no low-rank adapters: fine-tune it whole, without model.lora")
    targets = network.lora_targets()
    if lora.targets is not None:
        targets = matching(targets, lora.targets, "lora.targets")
    names = [name for name, _ in network.named_parameters()]
    whole = network.class_tables() + matching(names, lora.train or [], "lora.train")
    # PEFT reads a string as a pattern of the whole name, a list as ends of names
    pattern = "|".join(map(re.escape, targets))
    alpha = cast(int, lora.scale * lora.rank)  # it may be a fraction
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=pattern)
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if plain_name(name) in whole:
            parameter.requires_grad_(True)
    return targets


def adapter_state(network: Network) -> dict[str, Tensor]:
    """What trains, by plain name."""
    return {plain_name(n): p.detach() for n, p in network.named_parameters() if p.requires_grad}
