"""Published weights: the manifest, downloads, converters, loading, publishing, verification."""

from diffzoo.zoo.adapt import build_with
from diffzoo.zoo.loading import Loaded, load_any, locate
from diffzoo.zoo.manifest import Checkpoint, checkpoint, list_checkpoints, load_manifest
from diffzoo.zoo.metadata import Metadata, class_list, metadata_of

__all__ = [
    "Checkpoint",
    "Loaded",
    "Metadata",
    "build_with",
    "checkpoint",
    "class_list",
    "list_checkpoints",
    "load_any",
    "load_manifest",
    "locate",
    "metadata_of",
]  # fmt: skip
