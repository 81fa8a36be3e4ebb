"""GPUs that a run can be planned for: memory and peak throughput."""

from dataclasses import dataclass

import torch

from diffzoo.errors import UserError, did_you_mean

__all__ = ["GIB", "GPU", "GPUS", "find_gpu", "present_gpu", "this_gpu"]

GIB = 2**30
# CUDA's context and libraries, and what the caching allocator cannot use, as a share of the memory
CONTEXT_BYTES = 0.8 * GIB
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class GPU:
    """An accelerator.

    Args:
        name: short name, as in `--gpu`.
        memory: bytes a process sees.
        tflops: peak of dense bfloat16 (float16 before Ampere) matrix products, with float32 sums.
    """

    name: str
    memory: float
    tflops: float

    @property
    def usable(self) -> float:
        """Bytes that tensors can have."""
        return self.memory * (1 - FRAGMENTATION) - CONTEXT_BYTES


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("b200", 178 * GIB, 2250),
        GPU("h200", 139 * GIB, 989),
        GPU("h100", 79 * GIB, 989),
        GPU("a100-80", 79 * GIB, 312),
        GPU("a100-40", 39 * GIB, 312),
        GPU("l40s", 44 * GIB, 362),
        GPU("a10", 22 * GIB, 125),
        GPU("l4", 22 * GIB, 121),
        GPU("rtx4090", 23.5 * GIB, 165),
        GPU("rtx3090", 23.5 * GIB, 71),
        GPU("v100", 15.7 * GIB, 125),
        GPU("t4", 14.6 * GIB, 65),
    )
}


def find_gpu(name: str) -> GPU:
    """A card by short name, or by the name its driver gives.

    Raises:
        UserError: for an unknown one, naming the nearest.
    """
    key = name.lower().replace("rtx ", "rtx").replace(" ", "-")
    for maker in ("nvidia-", "geforce-", "tesla-"):
        key = key.removeprefix(maker)
    if key in GPUS:
        return GPUS[key]
    for short, gpu in GPUS.items():
        base, _, size = short.partition("-")
        rest = key.removeprefix(base)
        if rest != key and not rest[:1].isdigit() and (not size or size in rest):
            return gpu
    raise UserError(f"unknown GPU {name!r}{did_you_mean(name, GPUS)}")


def present_gpu() -> GPU | None:
    """The card of this machine, with the memory it reports; None without one or for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    try:
        known = find_gpu(properties.name)
    except UserError:
        return None
    return GPU(known.name, properties.total_memory, known.tflops)


def this_gpu() -> GPU:
    """The card of this machine; one that is not in the table is known by its memory and taken for 100 TFLOPs."""
    properties = torch.cuda.get_device_properties(0)
    return present_gpu() or GPU(properties.name, properties.total_memory, 100)
