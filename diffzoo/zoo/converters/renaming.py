"""Converting a state dict by renaming alone, with the network itself as the list of what must be there."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffzoo.models.base import Config
from diffzoo.tensors import check_tensors

__all__ = ["Rules", "converters", "on_meta", "renamed"]

C = TypeVar("C", bound=Config)
Convert = Callable[[Mapping[str, Tensor], C], dict[str, Tensor]]
Rules = Sequence[tuple[str, str]]


class Renaming:
    """A one-to-one map between official names and ours.

    Args:
        network: a network of the wanted config, on the meta device.
        official_name: from one of our names to the official one.
        layout: what to call the official layout in messages.
    """

    def __init__(self, network: nn.Module, official_name: Callable[[str], str], layout: str):
        self.layout = layout
        self.shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        self.ours = {official_name(name): name for name in self.shapes}
        if len(self.ours) != len(self.shapes):
            raise AssertionError(f"the {layout} renaming is not one to one")

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours."""
        wanted = {official: self.shapes[ours] for official, ours in self.ours.items()}
        check_tensors(state, wanted, f"official {self.layout} weights")
        return {ours: state[official] for official, ours in self.ours.items()}

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names to the official ones."""
        check_tensors(state, self.shapes, f"{self.layout} weights")
        return {official: state[ours] for official, ours in self.ours.items()}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory: names and shapes only."""
    with torch.device("meta"):
        return build()


def renamed(name: str, rules: Rules) -> str:
    """A name after the first of the rules, (pattern, replacement), that matches it."""
    for pattern, replacement in rules:
        name, hits = re.subn(pattern, replacement, name)
        if hits:
            break
    return name


def converters(
    network: Callable[[C], nn.Module], official_name: Callable[[str, C], str], layout: str
) -> tuple[Convert[C], Convert[C]]:
    """`from_official` and `to_official` of a layout that differs in names alone; the tensors are the same objects.

    Both raise a `UserError` for unknown or missing names and for wrong shapes, naming them.

    Args:
        network: its class.
        official_name: from one of our names, and the config, to the official name.
        layout: what to call the official layout in messages.
    """

    @lru_cache(maxsize=32)
    def renaming(config: C) -> Renaming:
        return Renaming(on_meta(lambda: network(config)), lambda name: official_name(name, config), layout)

    def from_official(state: Mapping[str, Tensor], config: C) -> dict[str, Tensor]:
        return renaming(config).from_official(state)

    def to_official(state: Mapping[str, Tensor], config: C) -> dict[str, Tensor]:
        return renaming(config).to_official(state)

    return from_official, to_official
