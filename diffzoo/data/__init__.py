"""Batches: data modules whose position is exact, elastic and part of the checkpoint.

Importing this package is light; each name is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffzoo.data.base import ImageDataModule
    from diffzoo.data.datasets import Cifar10, Coco, HFDataset, ImageFolder, ImageNet
    from diffzoo.data.demo import DemoData
    from diffzoo.data.latents import Latents

__all__ = ["Cifar10", "Coco", "DemoData", "HFDataset", "ImageDataModule", "ImageFolder", "ImageNet", "Latents"]

_HOME = dict.fromkeys(__all__, "datasets") | {"DemoData": "demo", "ImageDataModule": "base", "Latents": "latents"}
_RENAMED = {"HubImages": "HFDataset"}  # the old name still opens old runs and recipes


def __getattr__(name: str) -> Any:
    name = _RENAMED.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module 'diffzoo.data' has no attribute {name!r}")
    return getattr(import_module(f"diffzoo.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
