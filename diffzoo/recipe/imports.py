"""Lightning without the rest of `torchmetrics`, of which it uses two base classes."""

import logging
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec

__all__ = ["postpone_torchmetrics"]


def postpone_torchmetrics() -> None:
    """Give Lightning the two base classes, and run `torchmetrics/__init__.py` when anything else is asked for.

    It imports transformers, torchvision and SciPy's signal processing: a fifth of the CPU time to the first step of a
    run. Has no effect where `torchmetrics` is imported already.
    """
    spec = find_spec("torchmetrics") if "torchmetrics" not in sys.modules else None
    if spec is None or spec.loader is None:
        return
    loader, package = spec.loader, module_from_spec(spec)
    sys.modules["torchmetrics"] = package
    names = vars(package)

    def load(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")
        names.pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, name)

    names |= {"_logger": logging.getLogger("torchmetrics"), "__getattr__": load}  # its submodules import the logger
    with suppress(ImportError, AttributeError):  # a version that keeps them elsewhere is imported whole
        import_module("torchmetrics.utilities")  # the package's own order; any other is a circle
        names["__version__"] = import_module("torchmetrics.__about__").__version__
        names["MetricCollection"] = import_module("torchmetrics.collections").MetricCollection
        names["Metric"] = import_module("torchmetrics.metric").Metric
