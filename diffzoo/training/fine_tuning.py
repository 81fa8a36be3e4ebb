"""A training run that starts from weights: the network, its process, and the class table for the classes of the data.

What then trains, and at which learning rate, is in `freezing.py` and `lora.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from diffzoo.errors import UserError
from diffzoo.factory import create_model
from diffzoo.models.base import Network
from diffzoo.process import DiscreteBetas, GaussianProcess, Shifted
from diffzoo.sizes import as_size, mean_side, size_text
from diffzoo.training.lora import LoRA
from diffzoo.training.steps import say
from diffzoo.zoo.adapt import copy_classes
from diffzoo.zoo.loading import locate
from diffzoo.zoo.metadata import metadata_of

__all__ = ["build_network", "check_process", "shifted", "start"]


def build_network(network: Network | str, overrides: Mapping[str, Any] | None, weights: str | None) -> Network:
    """The network that trains, in training mode; a built one is returned as it is.

    `overrides` are those of the registered config, and `classes`, what becomes of the class table of `weights`.
    """
    if not isinstance(network, str):
        if overrides or weights:
            raise UserError("network_args and weights need the network to be a registered name, got a built network")
        return network
    overrides = dict(overrides or {})
    if not weights:  # they are about weights; `start` asks for those
        overrides = {k: v for k, v in overrides.items() if k not in ("classes", "class_names")}
    if weights and overrides.get("classes") == "copy" and not overrides.get("class_names"):
        overrides["classes"] = "mean"  # until the names are known, in `start`
    # loaded weights come in eval mode, in which dropout and recomputation of activations would be off
    return create_model(network, pretrained=weights, **overrides).train()


def start(
    network: Network, weights: str | None, classes: object, lora: LoRA | None, class_names: Sequence[str]
) -> None:
    """Check that there are weights where the recipe speaks of them; copy the rows of classes that they know by name.

    `classes` is the policy `network_args.classes`, `class_names` are those of the data. A resumed run then loads its
    own weights.
    """
    if lora is not None and not weights:
        raise UserError("low-rank adapters belong to trained weights: say which with model.weights")
    if classes is not None and not weights:
        raise UserError(
            f"network_args.classes is {classes}, what becomes of the class table of trained weights: "
            "say which with model.weights, or leave it out"
        )
    if classes == "copy" and class_names:
        same = copy_classes(network, locate(str(weights)), class_names)
        say(f"classes that start from their own weights: {', '.join(same) or 'none'}")


def check_process(network: Network, process: GaussianProcess, weights: str) -> None:
    """Raise if input or output of the weights mean something else in this process; warn if the noise differs."""
    trained = metadata_of(network).process
    if trained is None:
        return
    for name in ("prediction", "noise_conditioning", "learned_variance"):
        theirs, ours = getattr(trained, name), getattr(process, name)
        if theirs != ours:
            raise UserError(
                f"the weights in {weights} were trained with another {name}, {theirs}, than the recipe has, {ours}: "
                "set model.process to that of the weights"
            )
    for name in ("schedule", "path"):
        if getattr(trained, name) != getattr(process, name):
            rank_zero_warn(f"the weights in {weights} were trained with another {name} than this recipe has: the "
                           "network has to learn it anew")  # fmt: skip


def shifted(process: GaussianProcess, network: Network) -> GaussianProcess:
    """The process with its schedule shifted from the image size of the weights to the network's."""
    size = metadata_of(network).provenance.adapted_from.get("image_size")
    if size is None:
        return process
    if isinstance(process.schedule, DiscreteBetas):
        raise UserError("a table of betas cannot be shifted to another resolution: state a continuous schedule")
    old, new = as_size(size), network.config.image_size
    schedule = Shifted(process.schedule, from_resolution=mean_side(old), to_resolution=mean_side(new))
    say(f"schedule shifted from {size_text(old)} to {size_text(new)} px: {schedule.shift:+.3f} log-SNR")
    return replace(process, schedule=schedule)
