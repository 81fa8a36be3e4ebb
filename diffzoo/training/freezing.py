"""Which parameters train, and at which share of the learning rate.

Both depend on depth, counted in blocks (`Network.units`) in the order in which they run:

    0       what runs before the first block: the input layer, the noise level's embedding
    k       the k-th block, and what follows it before the next: resampling, the fusion of skips
    n + 1   what runs after the last block: the output layer

The order is found by a pass on tensors without data, since no family registers its blocks in the order in which they
run. The class table is no layer: it is what fine-tuning to new classes has to learn, so no preset freezes it and
layer-wise decay leaves it the full learning rate.
"""

import fnmatch
from collections.abc import Callable, Sequence

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.base import Network
from diffzoo.training.planning import fake_pass

__all__ = ["PRESETS", "depths", "freeze", "learning_rate_shares", "matching"]

PRESETS = {
    "blocks": "the blocks; input, conditioning and output layers train",
    "first_half": "everything up to the middle block",
    "all_but_classes": "everything but the class table",
}


def depths(network: Network) -> dict[str, int]:
    """Depth of every parameter, by name; 0 to the number of blocks and one more."""
    found = _module_depths(network)
    count = len(list(network.units()))
    result = {}
    for name, _ in network.named_parameters():
        owner, depth = name, None
        while depth is None:  # the nearest module around it that was called
            owner, _, _ = owner.rpartition(".")
            depth = found.get(owner) if owner else found.get("", 0)
        result[name] = depth
    return {name: min(depth, count + 1) for name, depth in result.items()}


def _module_depths(network: Network) -> dict[str, int]:
    """Depth of each module at its first call."""
    found: dict[str, int] = {}
    count = len(list(network.units()))
    started, ended = 0, 0

    def begin(name: str, is_unit: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal started
            started += is_unit
            found.setdefault(name, started + (ended == count))

        return hook

    def end(*_: object) -> None:
        nonlocal ended
        ended += 1

    def prepare(twin: Network) -> None:
        units = {id(unit) for unit in twin.units()}
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(begin(name, id(module) in units))
            if id(module) in units:
                module.register_forward_hook(end)

    fake_pass(network, prepare)
    return found


def freeze(network: Network, what: str | Sequence[str]) -> list[str]:
    """Stop parameters from training; returns their names.

    Args:
        network: changed in place.
        what: one of `PRESETS`, or shell patterns of parameter names such as `["down.*", "conv_in.*"]`, which may freeze
            the class table too.

    Raises:
        UserError: for an unknown preset, a pattern that names nothing, or if nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    names = _preset(network, what) if isinstance(what, str) else matching(list(parameters), what, "freeze")
    for name in names:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"freeze {what!r} leaves nothing to train: choose another preset or fewer patterns")
    return names


def _preset(network: Network, preset: str) -> list[str]:
    if preset not in PRESETS:
        raise UserError(
            f"expected freeze to be one of {', '.join(PRESETS)} or a list of patterns, got {preset!r}"
            f"{did_you_mean(preset, PRESETS)}"
        )
    names = [name for name, _ in network.named_parameters()]
    if preset == "blocks":
        inside = {id(p) for unit in network.units() for p in unit.parameters()}
        names = [name for name, p in network.named_parameters() if id(p) in inside]
    elif preset == "first_half":
        at, count = depths(network), len(list(network.units()))
        names = [name for name in names if at[name] <= (count + 1) // 2]
    tables = set(network.class_tables())
    return [name for name in names if name not in tables]


def matching(names: Sequence[str], patterns: Sequence[str], key: str) -> list[str]:
    """The names that match any of some shell patterns, each of which must match some; `key` is for messages."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"{key}: nothing in this network is called {pattern!r}{did_you_mean(pattern, names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def learning_rate_shares(network: Network, decay: float) -> dict[str, float]:
    """The share of the learning rate that each parameter gets: `decay ** (n + 1 - depth)`, and 1 for class tables.

    Args:
        network: not changed.
        decay: in (0, 1]; 0.65 to 0.9 is usual for transformers.

    Raises:
        UserError: for a decay out of range.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay must lie in (0, 1], got {decay:g}")
    last = len(list(network.units())) + 1
    tables = set(network.class_tables())
    return {name: 1.0 if name in tables else decay ** (last - depth) for name, depth in depths(network).items()}
