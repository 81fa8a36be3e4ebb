"""FSDP2 by one declaration per family, `Network.fsdp_units()`; and tensors as parts and as wholes."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffzoo.errors import UserError
from diffzoo.models.base import Network

__all__ = [
    "clean_name",
    "is_sharded",
    "local_part",
    "part_of_whole",
    "reshard",
    "shard",
    "shard_of",
    "whole_state",
    "whole_tensor",
]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and of checkpoint_wrapper

OUTPUTS = ("training_outputs", "aligned", "log_variance")  # what a training step calls of a network


def shard(network: Network, mesh: DeviceMesh) -> Network:
    """Split every unit's parameters over the devices of a mesh, and what is left as one more group; in place.

    Raises:
        UserError: for a network with parameters of a single number, which FSDP2 does not shard.
    """
    if single := next((name for name, p in network.named_parameters() if not p.ndim), None):
        raise UserError(
            f"{type(network).__name__} has parameters of a single number, such as {single}, which FSDP2 cannot shard: "
            "train it with --trainer.strategy ddp"
        )
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for unit in reversed(network.fsdp_units()):  # a unit inside another one first
        fully_shard(unit, mesh=mesh)
    own = [m for m in OUTPUTS if getattr(type(network), m) is not getattr(Network, m)]
    fully_shard(network, mesh=mesh)
    for method in own:  # the parameters are gathered around `forward` alone unless told otherwise
        register_fsdp_forward_method(network, method)
    return network


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict on the CPU, clean names; gathered from shards, whole on rank 0 alone."""
    return {clean_name(n): whole_tensor(v, v).cpu() for n, v in network.state_dict().items()}


def clean_name(name: str) -> str:
    """A parameter's name without the wrappers of compilation and of activation checkpointing."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of a DTensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def whole_tensor(local: Tensor, like: Tensor) -> Tensor:
    """The whole of which `local` is this rank's part, if `like` is sharded: on the CPU, and on rank 0 only."""
    if not is_sharded(like):
        return local.detach()
    from torch.distributed import get_rank

    full = part_of_whole(local_part(local.detach()), like).full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if get_rank() == 0 else torch.empty(0, dtype=full.dtype)


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut without any communication."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return local_part(distribute_tensor(whole.to(local_part(like).device), mesh, placements, src_data_rank=None))


def part_of_whole(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which `local` is this rank's part, laid out as `like` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def reshard(network: nn.Module) -> None:
    """Free gathered parameters of FSDP2 modules, so that what is written to the shards is what is used next."""
    for module in network.modules():
        gather_again: object = getattr(module, "reshard", None)
        if callable(gather_again):
            gather_again()
