"""A small network of every family, and weights in which nothing is zero."""

import sys
from typing import TypeVar

import torch
from torch import nn

from diffzoo.models import Config, Network, entry, list_models

Module = TypeVar("Module", bound=nn.Module)
NETWORKS: list[type[Network]] = [entry(name).network for name in list_models()]
# class and the small config that its module gives as TINY, by the name of the class
FAMILIES: dict[str, tuple[type[Network], Config]] = {n.__name__: (n, sys.modules[n.__module__].TINY) for n in NETWORKS}


def perturbed(network: Module, by: float = 0.1) -> Module:
    """The network with normal noise added to all that trains, so that what starts at zero hides nothing."""
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return network
