"""FSDP2 by one declaration per family: `Network.fsdp_units()`."""

from typing import Any

from diffzoo.models.base import Network

__all__ = ["shard"]

OUTPUTS = ("training_outputs", "aligned", "log_variance")  # what a training step calls of a network


def shard(network: Network, mesh: Any) -> Network:
    """Split every unit's parameters over the devices of `mesh`, and what is left as one more group; in place.

    Args:
        network: on any device.
        mesh: the data-parallel dimension of a device mesh.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for unit in reversed(network.fsdp_units()):  # a unit inside another one first
        fully_shard(unit, mesh=mesh)
    own = [m for m in OUTPUTS if getattr(type(network), m) is not getattr(Network, m)]
    fully_shard(network, mesh=mesh)
    for method in own:  # the parameters are gathered around `forward` alone unless told otherwise
        register_fsdp_forward_method(network, method)
    return network
