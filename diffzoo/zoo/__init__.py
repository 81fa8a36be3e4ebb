"""Published weights: the manifest, downloads, converters, loading, publishing, verification."""

from diffzoo.zoo.adapt import build_with
from diffzoo.zoo.building import Loaded
from diffzoo.zoo.loading import load_any, locate
from diffzoo.zoo.manifest import Pretrained, find_pretrained, list_pretrained, load_manifest
from diffzoo.zoo.metadata import Metadata, Preset, class_list, metadata_of
from diffzoo.zoo.saving import save_pretrained

__all__ = [
    "Loaded",
    "Metadata",
    "Preset",
    "Pretrained",
    "build_with",
    "class_list",
    "find_pretrained",
    "list_pretrained",
    "load_any",
    "load_manifest",
    "locate",
    "metadata_of",
    "save_pretrained",
]  # fmt: skip
