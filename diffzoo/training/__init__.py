"""Training with Lightning: the module, its EMA, checkpoints, guards, logs and previews.

Importing this package is light, because planning needs torch alone. `__init__.pyi` lists its names.
"""

from diffzoo.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
