"""From a recipe to its plan, and from a plan to advice when the memory of a device runs out."""

from typing import Any

import torch

import diffzoo.models  # noqa: F401  registers the names
from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.models.registry import build
from diffzoo.training import freezing
from diffzoo.training.gpus import GIB, GPU
from diffzoo.training.lora import LoRA, inject
from diffzoo.training.planning import Plan, network_cost

__all__ = ["advice", "plan_content"]


def plan_content(
    content: dict[str, Any], where: str, devices: int = 1, shards: int = 1, mfu: float = 0.35, recompute: bool = False
) -> tuple[Plan, int | None]:
    """The plan of a recipe and the micro-batch that it states, if any.

    Args:
        content: the recipe as plain data.
        where: it came from, for messages.
        devices: number of GPUs.
        shards: GPUs that share weights, gradients, optimizer and EMA.
        mfu: assumed share of the peak FLOPs.
        recompute: plan with activation checkpointing, whatever the recipe says.

    Raises:
        UserError: for a recipe whose network is not a registered name.
    """
    model, trainer = content.get("model") or {}, content.get("trainer") or {}
    name, overrides = _network(model, where)
    overrides = {k: v for k, v in overrides.items() if k not in ("classes", "class_names")}  # of the weights
    with torch.device("meta"):
        network = build(name, **overrides)
        _choose_trained(network, model)
    network.set_grad_checkpointing(recompute or model.get("grad_checkpointing") or False)
    data = (content.get("data") or {}).get("init_args") or {}
    plan = Plan(
        cost=network_cost(network, half="16" in str(trainer.get("precision", "32"))),
        optimizer_states=_states(model.get("optimizer")),
        averages=_emas(trainer.get("callbacks")),
        companions=_frozen(model),
        batch=int(data.get("batch_size", 64)),
        steps=max(0, int(trainer.get("max_steps", 0) or 0)),
        devices=devices,
        shards=shards,
        mfu=mfu,
    )
    micro = data.get("micro_batch_size")
    return plan, None if micro is None else int(micro)


def _choose_trained(network: Network, model: dict[str, Any]) -> None:
    """Freeze what the recipe freezes: it has neither gradients nor optimizer states nor an EMA."""
    if model.get("freeze"):
        freezing.freeze(network, model["freeze"])
    if model.get("lora"):
        inject(network, LoRA(**model["lora"]))


def _network(model: dict[str, Any], recipe: str) -> tuple[str, dict[str, Any]]:
    network = model.get("network")
    if isinstance(network, str):
        return network, dict(model.get("network_args") or {})
    arguments = dict((network or {}).get("init_args") or {})
    name = arguments.pop("name", None)
    if name is None:
        raise UserError(f"the recipe {recipe} states no registered network: expected model.network, a name")
    for weights in ("pretrained", "checkpoint_path"):
        arguments.pop(weights, None)
    return name, {**arguments, **(arguments.pop("overrides", None) or {}), **((network or {}).get("dict_kwargs") or {})}


def _class(part: Any) -> tuple[str, dict[str, Any]]:
    """Short class name and arguments of an entry of a recipe."""
    if isinstance(part, str):
        return part.rsplit(".", 1)[-1], {}
    if not isinstance(part, dict):
        return "", {}
    return str(part.get("class_path", "")).rsplit(".", 1)[-1], dict(part.get("init_args") or {})


def _states(optimizer: Any) -> int:
    """Tensors of the size of the weights: the two moments of Adam and its kin, one for those with momentum alone."""
    kind, arguments = _class(optimizer)
    name = str(arguments.get("name", kind)).lower()
    return 1 if any(n in name for n in ("lion", "muon", "sgd")) else 2


def _emas(callbacks: Any) -> int:
    for callback in callbacks or []:
        kind, arguments = _class(callback)
        if kind == "EMA":
            return len(arguments.get("decays", [0.9999])) + len(arguments.get("stds", []))
    return 0


# millions of parameters of frozen encoders, which are kept in float32
FROZEN = {"KLAutoencoder": 84, "CLIPEncoder": 123, "MiniLMEncoder": 23, "T5Encoder": 4762}


def _frozen(model: dict[str, Any]) -> float:
    kinds = [_class(model.get(part))[0] for part in ("autoencoder", "text_encoder")]
    return sum(4e6 * FROZEN.get(kind, 0) for kind in kinds)


def advice(plan: Plan, recomputing: Plan, gpu: GPU, micro: int) -> str:
    """One sentence: what the plan says of `micro` images at once on a card, and the nearest setting that fits.

    Args:
        plan: of the recipe.
        recomputing: of the recipe with activations recomputed.
        gpu: the card that ran out of memory.
        micro: images per device at once.
    """
    share = max(1, plan.batch // plan.devices)
    needed, usable = plan.peak(micro) / GIB, plan.usable(gpu) / GIB
    said = (
        f"out of memory with {micro} images at once on a {gpu.name}: `diffzoo plan` expects a peak of {needed:.1f} GiB "
        f"of {usable:.1f} GiB usable"
    )
    if needed <= usable:
        said += ", so something else may be using the card"
    smaller = [m for m in range(min(micro - 1, share), 0, -1) if share % m == 0]
    fitting = next((m for m in smaller if m <= plan.largest_micro_batch(gpu)), 0)
    if fitting:
        return (
            f"{said}; set --data.init_args.micro_batch_size {fitting}, which changes memory and speed, not the result"
        )
    again = next((m for m in [micro, *smaller] if m <= recomputing.largest_micro_batch(gpu) and share % m == 0), 0)
    if again:
        return f"{said}; set --model.grad_checkpointing true and --data.init_args.micro_batch_size {again}"
    return f"{said}, and no micro-batch fits: shard it over more devices (ModelParallelStrategy) or take a larger card"
