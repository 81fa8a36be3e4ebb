"""Published weights: the manifest, downloads, converters, loading, publishing, verification."""

from diffzoo.zoo.adapt import build_with
from diffzoo.zoo.facts import Facts, class_list, facts_of
from diffzoo.zoo.loading import Loaded, load_any, locate
from diffzoo.zoo.manifest import Checkpoint, checkpoint, list_checkpoints, load_manifest

__all__ = [
    "Checkpoint", "Facts", "Loaded", "build_with", "checkpoint", "class_list", "facts_of", "list_checkpoints",
    "load_any", "load_manifest", "locate",
]  # fmt: skip
