"""What a process runs on: versions, processor, GPUs. `diffzoo doctor` prints it, and every run keeps it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["environment"]

PACKAGES = ("diffzoo", "torch", "lightning", "jsonargparse", "safetensors", "huggingface_hub", "datasets", "diffusers",
            "transformers", "timm", "peft", "torchvision", "numpy", "pillow")  # fmt: skip


def environment() -> dict[str, str]:
    """Names and values, as a person reads them.

    Raises:
        ImportError: if torch cannot be imported.
    """
    found = {"python": f"{platform.python_version()} on {platform.platform()}"}
    found |= {name: _version(name) for name in PACKAGES}
    import torch

    found["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if card.major >= 8 else "no bf16"
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        found[f"GPU {i}"] = f"{card.name}, {memory}, capability {card.major}.{card.minor}, {bf16}"
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        found["GPU"] = f"{'Apple (mps)' if mps else 'none'}; torch is built for CUDA {torch.version.cuda}"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
