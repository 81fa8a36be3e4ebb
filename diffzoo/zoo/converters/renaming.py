"""Converting a state dict by renaming alone, with the network itself as the list of what must be there."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffzoo.errors import UserError, did_you_mean

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
        return self._rename(state, self.ours, f"official {self.layout} weights")

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names to the official ones."""
        return self._rename(state, {ours: official for official, ours in self.ours.items()}, f"{self.layout} weights")

    def _rename(self, state: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> dict[str, Tensor]:
        unknown, missing = sorted(state.keys() - names.keys()), sorted(names.keys() - state.keys())
        if unknown:
            raise UserError(f"{what}: unknown {_some(unknown)}{did_you_mean(unknown[0], missing)}")
        if missing:
            raise UserError(f"{what}: missing {_some(missing)}")
        for name, tensor in state.items():
            want = self.shapes[names[name] if names[name] in self.shapes else name]
            if tuple(tensor.shape) != want:
                raise UserError(f"{what}: {name} has shape {tuple(tensor.shape)}, this config needs {want}")
        return {renamed: state[name] for name, renamed in names.items()}


def _some(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory: names and shapes only."""
    with torch.device("meta"):
        return build()
