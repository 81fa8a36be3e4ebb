"""`diffzoo doctor`: what an issue report needs: versions, devices, precision, caches, and whether the Hub answers."""

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("diffzoo", "torch", "lightning", "jsonargparse", "safetensors", "huggingface_hub", "datasets", "diffusers",
            "transformers", "timm", "peft", "torchvision", "numpy", "pillow")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `diffzoo doctor`."""
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub")


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if something that training needs is missing."""
    print(f"python           {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:<16} {_version(name)}")
    try:
        import torch
    except ImportError as error:
        print(f"torch cannot be imported: {error}", file=sys.stderr)
        return 1
    print(f"CPU              {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if card.major >= 8 else "no bf16"
        print(
            f"GPU {i:<13}{card.name}, {card.total_memory / 2**30:.1f} GiB, capability {card.major}.{card.minor}, {bf16}"
        )
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        print(f"GPU              {'Apple (mps)' if mps else 'none'}; torch is built for CUDA {torch.version.cuda}")
    _places()
    if not args.offline:
        _hub()
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _places() -> None:
    from diffzoo.cache import cache_dir, hub_cache_dir

    for name, place in (("cache", cache_dir()), ("Hub cache", hub_cache_dir()), ("here", Path.cwd())):
        existing = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        print(f"{name:<16} {place}, {free:.1f} GiB free{'' if os.access(existing, os.W_OK) else ', not writable'}")


def _hub() -> None:
    from diffzoo.hub import hub_answers, hub_endpoint, is_offline

    if is_offline():
        print(f"Hub              {hub_endpoint()}: offline mode is set (HF_HUB_OFFLINE)")
    elif reason := hub_answers():
        print(f"Hub              {hub_endpoint()} cannot be reached ({reason}): what lies in the caches works")
    else:
        print(f"Hub              {hub_endpoint()} answers")
