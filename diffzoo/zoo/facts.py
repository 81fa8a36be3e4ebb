"""The name of `diffzoo.zoo.metadata` in version 0.1, so that scripts which import it keep running."""

from diffzoo.models.registry import entry
from diffzoo.zoo.metadata import Metadata

__all__ = ["registered_facts"]


def registered_facts(name: str) -> Metadata:
    """The metadata of a registered name: its network and config, and no process."""
    found = entry(name)
    return Metadata(found.network, found.config, name=name)
