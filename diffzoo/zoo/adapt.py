"""Published weights for a config that differs from their own: what may differ, and how class tables follow."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Config, Network
from diffzoo.models.registry import config_to_dict
from diffzoo.zoo.facts import class_list
from diffzoo.zoo.loading import Weights, assign, build_meta

__all__ = ["ClassPolicy", "build_with"]

ClassPolicy = Literal["random", "mean", "copy"]
POLICIES = ("random", "mean", "copy")


def _keeps_weights(name: str) -> bool:
    # other overrides change what the network computes, even where all shapes stay (heads, norms, attention order)
    return "drop" in name or name in ("num_classes", "null_class", "image_size")


def build_with(
    weights: Weights,
    overrides: Mapping[str, Any],
    classes: ClassPolicy | None = None,
    class_names: Sequence[str] | None = None,
) -> Network:
    """A network with these weights and a config rewritten by `overrides`; its `facts` say so.

    Args:
        weights: from `locate`.
        overrides: of dropout, of the classes, or of the image size where no tensor depends on it.
        classes: what becomes of the class table when `num_classes` or `null_class` changes: "random" = initialised
            anew as the family does it, "mean" = every class begins as the mean of the old ones, "copy" = classes of
            the same name keep their row and new ones begin as the mean. The null class keeps its row.
        class_names: names of the new classes, for "copy" and for the facts.

    Raises:
        UserError: if an override changes what the weights mean, or `classes` is needed and absent.
    """
    base = weights.facts.build_config()
    cls = weights.facts.network_class()
    _check(overrides, base, weights.where, classes)
    config = base.override(**overrides)
    network = build_meta(cls, config)
    state = weights.state
    if (config.num_classes, config.null_class) != (base.num_classes, base.null_class):
        state = _reclassed(weights, base, config, network, classes, class_names)
    facts = replace(weights.facts, config=config_to_dict(config))
    if config.num_classes != base.num_classes or class_names is not None:
        facts = replace(facts, class_names=tuple(class_names or ()))
    assign(network, state, weights.where)
    network.facts = facts
    return network


def _check(overrides: Mapping[str, Any], base: Config, where: str, classes: str | None) -> None:
    if classes is not None and classes not in POLICIES:
        raise UserError(
            f"expected classes to be one of {', '.join(POLICIES)}, got {classes!r}{did_you_mean(classes, POLICIES)}"
        )
    base.override(**overrides)  # names a misspelt argument before anything else
    known = config_to_dict(base)
    for name, value in overrides.items():
        if not _keeps_weights(name) and config_to_dict(value) != known.get(name, object()):
            raise UserError(
                f"{name} changes the network that the weights in {where} belong to: leave it out, or create the model "
                "without pretrained weights"
            )


def _reclassed(
    weights: Weights,
    base: Config,
    config: Config,
    network: Network,
    policy: ClassPolicy | None,
    names: Sequence[str] | None,
) -> dict[str, Tensor]:
    if policy is None:
        raise UserError(
            f"the weights in {weights.where} have {base.num_classes} classes and a change of num_classes or null_class "
            "gives up some of what they learnt: say what the class table should become with "
            "classes='random', 'mean' or 'copy'"
        )
    wanted = network.state_dict()
    state = dict(weights.state)
    tables = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
    fresh = type(network)(config).state_dict() if tables else {}
    for key in tables:
        if key not in state or state[key].shape[1:] != wanted[key].shape[1:]:
            if policy != "random":
                raise UserError(f"{key} has no rows to start from in {weights.where}: use classes='random'")
            state[key] = fresh[key]
            continue
        state[key] = _table(state[key], fresh[key], weights, base, config, policy, names)
    return {k: v for k, v in state.items() if k in wanted}


def _table(
    old: Tensor,
    new: Tensor,
    weights: Weights,
    base: Config,
    config: Config,
    policy: ClassPolicy,
    names: Sequence[str] | None,
) -> Tensor:
    new = new.clone()
    if policy != "random":
        new[: config.num_classes] = old[: base.num_classes].mean(0)
    if policy == "copy":
        known = {name: i for i, name in enumerate(class_list(weights.facts.class_names))}
        if not known or names is None or len(names) != config.num_classes:
            raise UserError(
                f"classes='copy' needs the names of the old classes and {config.num_classes} class_names of the new "
                f"ones, got {len(known)} and {len(names or ())}"
            )
        pairs = [(i, known[name]) for i, name in enumerate(names) if name in known]
        if pairs:
            target, origin = torch.tensor(pairs).T
            new[target] = old[origin].to(new.dtype)
    if base.null_class and config.null_class:
        new[config.num_classes] = old[base.num_classes]
    return new
