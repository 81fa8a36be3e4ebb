"""Finding the weights of feature networks: by path, in their usual place, or in an installed package."""

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from diffzoo.errors import UserError

__all__ = ["carried_by_package", "environment_path", "missing_weights"]

ENTRY_POINTS = "diffzoo.feature_weights"


def environment_variable(network: str) -> str:
    """The variable that names the weights of a network: DIFFZOO_WEIGHTS_INCEPTION_2015 for `inception-2015`."""
    return "DIFFZOO_WEIGHTS_" + network.upper().replace("-", "_")


def environment_path(network: str) -> Path | None:
    """The path in the network's environment variable, checked to exist."""
    value = os.environ.get(environment_variable(network))
    return existing(value, environment_variable(network)) if value else None


def existing(path: str | os.PathLike[str], origin: str) -> Path:
    """`path`, or a `UserError` that names who asked for it."""
    if not Path(path).exists():
        raise UserError(f"{origin} names feature weights {path}, which do not exist")
    return Path(path)


def carried_by_package(network: str, package: str | None = None, file: str = "") -> Path | None:
    """Weights inside an installed package, found without importing it: one known by name, or any that declares the
    entry point `diffzoo.feature_weights` with the network's name and a function that returns a path."""
    for point in entry_points(group=ENTRY_POINTS, name=network):
        locate: Callable[[], str] = point.load()
        return existing(locate(), f"the package of entry point {point.value!r}")
    spec = find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.exists() else None


def missing_weights(network: str, usual: str, package: str) -> UserError:
    """The error that lists the three ways to get weights.

    Args:
        network: name of the feature network.
        usual: what the usual place is and how to fill it.
        package: how to get them from a package.
    """
    return UserError(
        f"the weights of the feature network {network!r} were not found; three ways to get them: (1) {usual}; "
        f"(2) give their path: --feature-weights {network}=PATH, or set {environment_variable(network)}=PATH; "
        f"(3) {package}"
    )
