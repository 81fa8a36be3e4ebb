"""Packages that training imports for the sake of one name, and whose `__init__` imports everything else.

Lightning needs two base classes of `torchmetrics`, which on import brings in whatever its metrics could use:
transformers, torchvision, SciPy's signal processing. The optimizers of `timm` need one function of `timm.models`, which
imports every model. Together that takes longer than Lightning itself, and no run uses it.
"""

import logging
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

__all__ = ["postpone_imports"]

# of each package, what is served without its `__init__`, and the module that has it
EARLY = {
    "torchmetrics": {
        "Metric": "torchmetrics.metric",
        "MetricCollection": "torchmetrics.collections",
        "__version__": "torchmetrics.__about__",
    },
    "timm": {"__version__": "timm.version"},
    "timm.layers": {"use_reentrant_ckpt": "timm.layers.config"},
    "timm.models": {"group_parameters": "timm.models._manipulate"},
}


class _Postponed(ModuleType):
    """A package whose `__init__` runs as soon as anybody asks for a name that is not in `EARLY`."""

    def __getattr__(self, name: str) -> object:
        home = EARLY[self.__name__].get(name)
        if home is None and name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with suppress(ImportError, AttributeError):  # a version that keeps it elsewhere is imported whole
            if home is not None:
                if self.__name__ == "torchmetrics":
                    import_module("torchmetrics.utilities")  # the package's own order; any other is a circle
                return getattr(import_module(home), name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


def postpone_imports() -> None:
    """Run the `__init__` of these packages when more than `EARLY` is asked for; those imported already stay."""
    for name in EARLY:
        spec = find_spec(name) if name not in sys.modules else None
        if spec is None:
            continue
        package = sys.modules[name] = module_from_spec(spec)
        package.__class__ = _Postponed
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, package)
        if name == "torchmetrics":
            package.__dict__["_logger"] = logging.getLogger(name)  # its submodules import this one
