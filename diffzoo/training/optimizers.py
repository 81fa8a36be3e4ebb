"""Optimizers by name and parameter groups by the family's own rule.

A recipe chooses a class, `{class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4}}`, or, for one of timm's names,
`{class_path: diffzoo.training.optimizers.timm_optimizer, init_args: {name: muon, lr: 1.0e-3}}`. The learning rate is
the one that is stated: nothing scales it by the batch or the number of devices.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffzoo.errors import UserError, did_you_mean

__all__ = ["adamw", "layer_decay_groups", "parameter_groups", "timm_optimizer"]

ParameterGroups = Iterable[Any]


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in one group, or in two where the family exempts some from weight decay.

    The exempt ones are those that `network.no_weight_decay()` names, and nothing else: most diffusion codes decay
    norms and biases too, and a recipe reproduces what its authors did. The second group has `weight_decay` 0.

    Raises:
        UserError: if nothing is trainable, or if a name that the family exempts does not exist.
    """
    trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("the network has no trainable parameters: all are frozen")
    rule = getattr(network, "no_weight_decay", None)
    exempt = set(rule()) if rule is not None else set()
    known = {n for n, _ in network.named_parameters()}
    for name in sorted(exempt - known):
        raise UserError(f"no_weight_decay() names {name!r}, which is no parameter of the network")
    groups = [
        {"params": [p for n, p in trainable.items() if n not in exempt]},
        {"params": [p for n, p in trainable.items() if n in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
