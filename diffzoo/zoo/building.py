"""Building a network without initialising it, and giving it its tensors.

A network is built with its parameters on the meta device (no memory, no random numbers) and then takes the tensors
of a memory-mapped file as they are: the pages are read on first use. Converted files are private mappings, so training
in place never writes to them.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffzoo.errors import UserError
from diffzoo.models.base import Config, Network
from diffzoo.process import GaussianProcess
from diffzoo.zoo.metadata import Metadata, Provenance, class_list

__all__ = ["Loaded", "Weights", "assign", "build_meta", "mismatch"]


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules built in the block, by this thread, get parameters on the meta device; buffers stay real."""
    owner = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != owner or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def build_meta(network: type[Network], config: Config) -> Network:
    """A network whose parameters have shapes but no values, in eval mode; its buffers are real."""
    with _meta_parameters():
        return network(config).eval()


def assign(network: Network, state: Mapping[str, Tensor], what: str) -> Network:
    """Give a network from `build_meta` its tensors, without copying those that have the right type.

    Raises:
        UserError: if names or shapes differ, saying which.
    """
    wanted = network.state_dict()
    problem = mismatch(wanted, state)
    if problem:
        raise UserError(f"the weights in {what} do not fit this network: {problem}")
    network.load_state_dict({k: state[k].to(v.dtype) for k, v in wanted.items()}, strict=True, assign=True)
    left = [k for k, v in (*network.named_parameters(), *network.named_buffers()) if v.is_meta]
    if left:
        raise RuntimeError(f"{type(network).__name__} left {left[0]} without a value")
    return network


def mismatch(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """In what names, shapes and kinds of numbers differ, in words; empty if they do not."""
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    kinds = (("missing", missing), ("unknown", extra))
    parts = [f"{len(names)} {kind}, for example {names[0]}" for kind, names in kinds if names]
    if shapes:
        k = shapes[0]
        parts.append(f"{k} should have shape {tuple(wanted[k].shape)}, got {tuple(state[k].shape)}")
    other = [k for k, v in wanted.items() if k in state and v.is_floating_point() and not state[k].is_floating_point()]
    if other:
        parts.append(
            f"{other[0]} should hold real numbers, got {state[other[0]].dtype}: quantised weights are not read"
        )
    return "; ".join(parts)


# -- weights and what is known about them


@dataclass(frozen=True)
class Weights:
    """Tensors under a network's own names, with their metadata and the place they come from."""

    state: Mapping[str, Tensor]
    metadata: Metadata
    where: str


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, ready to use, and what is known about them."""

    network: Network
    metadata: Metadata

    @property
    def process(self) -> GaussianProcess:
        """The process it was trained with; raises if it is not known."""
        return self.metadata.known_process()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order of the class index; empty if there are none."""
        return class_list(self.metadata.class_names)

    @property
    def provenance(self) -> Provenance:
        """Where the weights come from."""
        return self.metadata.provenance
