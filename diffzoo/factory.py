"""Registry and zoo joined: a model by name, with random or published weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffzoo.errors import UserError
from diffzoo.models import registry
from diffzoo.models.base import Network
from diffzoo.models.registry import Kind, build, entry

if TYPE_CHECKING:
    from diffzoo.zoo import Metadata, Pretrained
    from diffzoo.zoo.building import Weights

__all__ = ["create_model", "get_pretrained_cfg", "list_models"]


def list_models(
    patterns: str | Sequence[str] = "*",
    *modules: object,
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = (),
    kind: Kind = "denoiser",
    **unknown: object,
) -> list[str]:
    """Sorted names of the registered models, or `model.tag` of those with published weights.

    Args:
        patterns: shell patterns, such as "simple_*" or ["adm_*", "*emoji*"].
        pretrained: list the weights instead of the models; patterns then match either name.
        exclude_filters: patterns of names to leave out.
        kind: "denoiser", or "classifier" for the classifiers that guide.

    Raises:
        UserError: for an argument that is none of these.
    """
    for name in ("module",) * len(modules) + tuple(unknown):  # timm's second argument, and others
        raise UserError(f'list_models has no argument {name!r}: families and filters are patterns, such as "adm_*"')
    known = registry.list_models(kind=kind)
    if not pretrained:
        return registry.matching(known, patterns, exclude_filters)
    from diffzoo.zoo.manifest import load_manifest

    tagged = sorted(name for name in load_manifest() if name.split(".", 1)[0] in known)
    return registry.matching(tagged, patterns, exclude_filters)


def get_pretrained_cfg(name: str) -> "Pretrained":
    """What is known of published weights: source, hash, licences, process, published numbers.

    Args:
        name: `model.tag`, or `model` for its default.

    Raises:
        UserError: there are no such weights; names the nearest.
    """
    from diffzoo.zoo.manifest import find_pretrained

    return find_pretrained(name)


def create_model(
    name: str | Path,
    pretrained: bool | str | Path | None = None,
    *,
    classes: Literal["random", "mean", "copy"] | None = None,
    class_names: Sequence[str] | None = None,
    checkpoint_path: str | Path | None = None,
    **overrides: object,
) -> Network:
    """Build a network, with random weights or with those of a source.

    Args:
        name: a registered name (`list_models()`); or a source of weights by itself: `name.tag`,
            "hf-hub:owner/repo@revision", "local-dir:path", a run directory, a `.ckpt` or `.safetensors` file.
        pretrained: load weights: True = the published ones of that name; or any source, which may then also be a file
            that does not say which network it belongs to. False = random weights, of the network of `name.tag` too;
            None = random weights for a registered name, its own for a source.
        classes: what becomes of the class table of pretrained weights when `num_classes` changes: "random", "mean" or
            "copy" (by name); see `diffzoo.zoo.adapt.build_with`.
        class_names: names of the new classes.
        checkpoint_path: the same as `pretrained=PATH`, by the name that it has in timm.
        overrides: rewrites of the config, for example `num_classes=10`, `dropout=0.2`, `depth_at={16: 36}`; with
            pretrained weights only such as keep them valid: classes, dropout and `image_size`, for which learned
            positions are resampled. A bare state dict of one's own takes the overrides that it was trained with.

    Raises:
        UserError: for an unknown name or argument, naming the nearest right one; for weights that cannot be had.
    """
    name = str(name) if isinstance(name, Path) else name
    if isinstance(pretrained, str) and not pretrained.strip():
        raise UserError("pretrained is an empty text: expected a source of weights, True or False")
    if checkpoint_path:
        if pretrained:
            raise UserError("checkpoint_path and pretrained are both sources of weights: give one of them")
        pretrained = checkpoint_path
    registered = _is_registered(name)
    if registered and not pretrained:
        if classes is not None or class_names is not None:
            raise UserError("classes and class_names say what becomes of pretrained weights: pass pretrained=True too")
        return build(name, **overrides)
    if not registered and not is_source(name):
        entry(name)  # raises, and names the nearest
    if not registered and pretrained is False:
        return _untrained(name, overrides)
    if not registered and not isinstance(pretrained, bool | None):
        raise UserError(
            f"{name!r} is itself a source of weights: leave out pretrained, or give a registered name first"
        )
    from diffzoo.zoo.adapt import build_as, build_with
    from diffzoo.zoo.loading import locate
    from diffzoo.zoo.metadata import Metadata

    if not pretrained or pretrained is True:
        return build_with(locate(name), overrides, classes, class_names)
    found = entry(name)
    unsaid = Metadata(found.network, found.config, name)  # for files that do not say what they hold
    if overrides and (own := _described(unsaid, pretrained, overrides)) is not None:
        return build_as(name, own, {}, None, class_names)
    return build_as(name, locate(pretrained, metadata=unsaid), overrides, classes, class_names)


def _untrained(name: str, overrides: Mapping[str, object]) -> Network:
    """The network of published weights, with random ones; nothing is fetched."""
    from diffzoo.zoo.manifest import find_pretrained

    if not _is_registered(name.split(".", 1)[0]):
        raise UserError(f"{name!r} is itself a source of weights: pretrained=False needs a registered name or name.tag")
    metadata = find_pretrained(name).metadata
    return metadata.network(metadata.config.override(**overrides))


def _described(unsaid: "Metadata", source: str | Path, overrides: Mapping[str, object]) -> "Weights | None":
    """Weights of a bare file that fit the registered config with the overrides, as their owner describes them."""
    from diffzoo.zoo.loading import locate

    try:
        described = replace(unsaid, config=unsaid.config.override(**overrides))
        weights = locate(source, metadata=described)
    except UserError:  # the overrides change other weights, or the file is wrong, which is said there
        return None
    bare = replace(weights.metadata, provenance=described.provenance) == described
    return weights if bare else None


def _is_registered(name: str) -> bool:
    try:
        entry(name)
    except UserError:
        return False
    return True


def is_source(name: str) -> bool:
    """Whether `name` can be a source of weights, rather than a mistyped name of a model."""
    from diffzoo.formats import SUFFIXES
    from diffzoo.zoo.manifest import is_pretrained

    if not isinstance(name, str) or not name:
        return False
    place = "/" in name or name.startswith(("hf-hub:", "local-dir:")) or Path(name).suffix in SUFFIXES
    return place or is_pretrained(name.split(".", 1)[0]) or Path(name).exists()
