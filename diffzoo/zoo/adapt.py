"""Weights for a config that differs from their own: what may differ, and what happens to tables.

classes     A change of `num_classes` or `null_class` needs a policy (`build_with`); the null class keeps its row.
            In a network that had no classes, the new table begins at zero: a network that adds the class to its
            conditioning then computes exactly what it did, and one that reads it as a token, or averages it with
            the noise level as EDM2 does, computes nearly the same.
resolution  Another `image_size` keeps all weights. Learned positions are resampled bicubically, with antialiasing
            when the grid shrinks, so each keeps its relative position in the image.
names       Weights of one registered name may start another of the same family if only classes, dropout and
            resolution differ: `uvit_bao_l_512` from the weights of `uvit_bao_l_256`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config, Network
from diffzoo.models.registry import entry
from diffzoo.nn.embeddings import resample_grid
from diffzoo.record import to_plain
from diffzoo.zoo.building import Weights, assign, build_meta
from diffzoo.zoo.metadata import class_list, metadata_of

__all__ = ["ClassPolicy", "adapt_to", "build_as", "build_with", "copy_classes", "resample_positions"]

ClassPolicy = Literal["random", "mean", "copy"]
POLICIES = ("random", "mean", "copy")


def _keeps_weights(field: str) -> bool:
    """Whether a field of a config may differ from that of the weights: those of classes, dropout and resolution.

    Others change what the network computes, even where all shapes stay (heads, norms, attention order).
    """
    return "drop" in field or field in ("num_classes", "null_class", "image_size", "resolution", "grid")


def build_with(
    weights: Weights,
    overrides: Mapping[str, object],
    classes: ClassPolicy | None = None,
    class_names: Sequence[str] | None = None,
) -> Network:
    """A network with these weights and a config rewritten by `overrides`; its `metadata` say so.

    Args:
        weights: from `locate`.
        overrides: of dropout, of the classes, or of the image size; learned positions are resampled.
        classes: what becomes of the class table, needed when `num_classes` or `null_class` changes: "random" = made
            anew as the family does it, "mean" = every class begins as the mean of the old ones, "copy" = classes of
            the same name, or one of several separated by ", ", keep their row and new ones begin as the mean. The null
            class keeps its row.
        class_names: names of the new classes, for "copy" and for the metadata.

    Raises:
        UserError: if an override changes what the weights mean, or `classes` is needed and absent.
    """
    _check(overrides, weights, classes)
    return _adapted(weights, weights.metadata.config.override(**overrides), classes, class_names)


def build_as(
    name: str,
    weights: Weights,
    overrides: Mapping[str, object],
    classes: ClassPolicy | None = None,
    class_names: Sequence[str] | None = None,
) -> Network:
    """The registered network `name`, started from these weights.

    Weights of that very name bring their own config, as in `build_with`; those of another name of the family are
    adapted to the config registered under `name`.

    Args:
        name: a registered name.
        weights, overrides, classes, class_names: as for `build_with`.

    Raises:
        UserError: for weights of another architecture, naming what differs; and as `build_with` does.
    """
    found = entry(name)
    theirs = weights.metadata
    if theirs.network is not found.network:
        raise UserError(
            f"expected weights of {name}, a {found.network.__name__}, in {weights.where}, got those of "
            f"{theirs.name or 'a network'}, a {theirs.network.__name__}: give weights of the same family, or set "
            f"the network to {theirs.name or 'theirs'}"
        )
    if theirs.name in (None, name, theirs.network.__name__):
        return build_with(weights, overrides, classes, class_names)
    _check({}, weights, classes)
    config = found.config.override(**overrides)
    ours, old = to_plain(config), to_plain(theirs.config)
    for field in ours:
        if not _keeps_weights(field) and _fixed(ours[field]) != _fixed(old.get(field)):
            raise UserError(
                f"expected weights of {name} in {weights.where}, got those of {theirs.name}, which differs in "
                f"{field}: only classes, dropout and the resolution may differ"
            )
    made = _adapted(weights, config, classes, class_names)
    made.metadata = replace(metadata_of(made), name=name)
    return made


def adapt_to(weights: Weights, config: Config) -> Network:
    """A network of this config, started from these weights; rows of another class table are made anew.

    For callers that know the config and bring the class table themselves.
    """
    return _adapted(weights, config, "random" if _other_classes(weights, config) else None, None)


def _other_classes(weights: Weights, config: Config) -> bool:
    base = weights.metadata.config
    return (config.num_classes, config.null_class) != (base.num_classes, base.null_class)


def copy_classes(network: Network, weights: Weights, class_names: Sequence[str]) -> list[str]:
    """Give the classes of a network the rows that classes of the same name have in `weights`; returns these names.

    For networks built with the policy "mean" before the names of their classes were known.
    """
    known = _by_name(weights)
    same = [(i, known[name]) for i, name in enumerate(class_names) if name in known]
    base = weights.metadata.config
    state = network.state_dict()
    if same:
        target, origin = torch.tensor(same).T
        for key in network.class_tables():
            old = weights.state.get(key)
            if old is not None and len(old) in (base.num_classes, base.class_rows):
                with torch.no_grad():
                    state[key][target] = old[origin].to(state[key].device, state[key].dtype)
    return [class_names[i] for i, _ in same]


def _by_name(weights: Weights) -> dict[str, int]:
    """Index of every class by its name, and by each of several names that no other class shares ("dog, hound")."""
    names = class_list(weights.metadata.class_names)
    single = [(part, i) for i, name in enumerate(names) for part in name.split(", ")]
    counts = Counter(part for part, _ in single)
    return {part: i for part, i in single if counts[part] == 1} | {name: i for i, name in enumerate(names)}


def _fixed(data: object) -> object:
    """A part of a config as data, without the fields that may differ."""
    if isinstance(data, dict):
        return {k: _fixed(v) for k, v in data.items() if not _keeps_weights(k)}
    return [_fixed(v) for v in data] if isinstance(data, list) else data


def _adapted(
    weights: Weights, config: Config, classes: ClassPolicy | None, class_names: Sequence[str] | None
) -> Network:
    cls, base = weights.metadata.network, weights.metadata.config
    network = build_meta(cls, config)
    state = dict(weights.state)
    old, new = build_meta(cls, base).position_tables(), network.position_tables()
    for name in new:
        if old.get(name) != new[name] and name in old:
            state[name] = resample_positions(state[name], old[name], new[name])
    if classes is not None or _other_classes(weights, config):
        state = _reclassed(replace(weights, state=state), network, classes, class_names)
    changed = {k: getattr(base, k) for k in ("image_size", "num_classes") if getattr(base, k) != getattr(config, k)}
    metadata = replace(weights.metadata.derived(adapted_from=changed), config=config)
    given = None if class_names is None else [isinstance(name, str) for name in class_names]
    if isinstance(class_names, str) or given not in (None, [True] * config.num_classes):
        raise UserError(f"expected a list of {config.num_classes} class_names, one per class, got {class_names!r:.80}")
    if config.num_classes != base.num_classes or class_names is not None:
        metadata = replace(metadata, class_names=tuple(class_names or ()))
    assign(network, state, weights.where)
    network.metadata = metadata
    return network


def resample_positions(table: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """A table of learned positions for another grid; returns a tensor of its own.

    Args:
        table: `(..., n, c)`.
        old, new: (rows of no place, rows and columns of the grid), as `Network.position_tables` says. A row of no
            place that is new stands first and is zero; one that is no more is the first.
    """
    extra, rows, columns = old
    head, places = table[..., :extra, :], table[..., extra:, :]
    if new[0] > extra:
        head = torch.cat([head.new_zeros(*head.shape[:-2], new[0] - extra, head.shape[-1]), head], dim=-2)
    head = head[..., head.shape[-2] - new[0] :, :]
    return torch.cat([head, resample_grid(places, (rows, columns), new[1:])], dim=-2)


def _check(overrides: Mapping[str, object], weights: Weights, classes: str | None) -> None:
    if classes is not None and classes not in POLICIES:
        raise UserError(
            f"expected classes to be one of {', '.join(POLICIES)}, got {classes!r}{did_you_mean(classes, POLICIES)}"
        )
    base = weights.metadata.config
    base.override(**overrides)  # names a misspelt argument before anything else
    known = to_plain(base)
    for name, value in overrides.items():
        if not _keeps_weights(name) and to_plain(value) != known.get(name, object()):
            raise UserError(
                f"{name} changes the network that the weights in {weights.where} belong to: leave it out, or create "
                "the model without pretrained weights"
            )


def _reclassed(
    weights: Weights, network: Network, policy: ClassPolicy | None, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """The state for another class table."""
    config = network.config
    if policy is None and config.num_classes:
        raise UserError(
            f"the weights in {weights.where} have {weights.metadata.config.num_classes} classes and a change of "
            "num_classes or null_class gives up some of what they learnt: say what the class table should become with "
            "classes='random', 'mean' or 'copy'"
        )
    wanted = network.state_dict()
    state = dict(weights.state)
    tables = network.class_tables()
    fresh = type(network)(config).state_dict() if tables else {}
    for key in tables:
        if key in state and state[key].shape[1:] == wanted[key].shape[1:]:
            state[key] = _table(state[key], fresh[key], weights, config, policy, names)
            continue
        if policy == "copy":
            raise UserError(f"{key} has no rows to copy in {weights.where}: use classes='mean' or 'random'")
        state[key] = torch.zeros_like(fresh[key]) if policy == "mean" else fresh[key].clone()
        state[key][config.num_classes :] = 0  # under the null class the network computes what it did
    return {k: v for k, v in state.items() if k in wanted}


def _table(
    old: Tensor, new: Tensor, weights: Weights, config: Config, policy: ClassPolicy | None, names: Sequence[str] | None
) -> Tensor:
    """A class table `new` that begins as the policy says, from the table `old` of the weights."""
    count = weights.metadata.config.num_classes
    new = new.clone()
    if policy != "random":
        new[: config.num_classes] = old[:count].mean(0)
    if policy == "copy":
        known = _by_name(weights)
        if not known or names is None or len(names) != config.num_classes:
            raise UserError(
                f"classes='copy' needs the names of the old classes and {config.num_classes} class_names of the new "
                f"ones, got {len(class_list(weights.metadata.class_names))} and {len(names or ())}"
            )
        for i, name in enumerate(names):
            if name in known:
                new[i] = old[known[name]].to(new.dtype)
    if len(old) > count and len(new) > config.num_classes:
        new[config.num_classes] = old[count]
    return new
