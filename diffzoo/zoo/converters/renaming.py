"""Converting a state dict by renaming alone, with the network itself as the list of what must be there."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffzoo.tensors import check_tensors

__all__ = ["Renaming", "on_meta"]


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
