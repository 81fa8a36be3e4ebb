"""Registry and zoo joined: a model by name, with random or published weights."""

from typing import Any

from diffzoo.models.base import Network
from diffzoo.models.registry import build

__all__ = ["create_model"]


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> Network:
    """Build a registered network.

    Args:
        name: a registered name (`list_models()`).
        pretrained: load the published weights of that name.
        overrides: rewrites of the config, for example `num_classes=10`, `dropout=0.2`, `depth_at={16: 36}`.

    Raises:
        UserError: for an unknown name or argument, naming the nearest right one.
    """
    return build(name, **overrides)
