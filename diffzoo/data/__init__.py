"""Batches: data modules whose position is exact, elastic and part of the checkpoint.

Importing this package is light. `__init__.pyi` lists its names.
"""

from diffzoo.lazy import attach

_load, __dir__, __all__ = attach(__name__, __file__)


def __getattr__(name: str) -> object:
    return _load("HFDataset" if name == "HubImages" else name)  # its name in earlier versions
