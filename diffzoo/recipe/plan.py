"""From a recipe to its plan, and from a plan to advice when the memory of a device runs out."""

from collections.abc import Mapping
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

__all__ = ["advice", "network_of", "numbers", "plan_content", "shown"]


def plan_content(
    content: dict[str, Any],
    where: str,
    devices: int | None = None,
    shards: int | None = None,
    mfu: float = 0.35,
    recompute: bool = False,
) -> tuple[Plan, int | None]:
    """The plan of a recipe and the micro-batch that it states, if any.

    Args:
        content: the recipe as plain data.
        where: it came from, for messages.
        devices: number of GPUs; None = as the trainer states, 1 where it leaves them to the machine.
        shards: GPUs that share weights, gradients, optimizer and EMA; None = all with ModelParallelStrategy, else 1.
        mfu: assumed share of the peak FLOPs.
        recompute: plan with activation checkpointing, whatever the recipe says.

    Raises:
        UserError: for a recipe whose network is not a registered name.
    """
    model, trainer = content.get("model") or {}, content.get("trainer") or {}
    devices = devices or _devices(trainer)
    network = network_of(model, where)
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
        shards=shards or (devices if "ModelParallelStrategy" in str(trainer.get("strategy")) else 1),
        mfu=mfu,
    )
    micro = data.get("micro_batch_size")
    return plan, None if micro is None else int(micro)


def _devices(trainer: dict[str, Any]) -> int:
    if trainer.get("devices", "auto") in ("auto", -1, "-1", None):
        return 1
    from diffzoo.recipe.command import world_size

    return world_size(trainer)


def network_of(model: Mapping[str, Any], where: str) -> Network:
    """The network of a recipe on the device "meta", with adapters, and frozen as the recipe says.

    Args:
        model: the key `model` of the recipe.
        where: it came from, for messages.

    Raises:
        UserError: if it is no registered name.
    """
    stated = model.get("network")
    if isinstance(stated, str):
        name, overrides = stated, dict(model.get("network_args") or {})
    else:  # `create_model` as a class of version 0.1
        overrides = dict((stated or {}).get("init_args") or {})
        name = overrides.pop("name", "")
        overrides |= {**(overrides.pop("overrides", None) or {}), **((stated or {}).get("dict_kwargs") or {})}
    if not name:
        raise UserError(f"the recipe {where} states no registered network: expected model.network, a name")
    of_weights = ("pretrained", "checkpoint_path", "classes", "class_names")
    with torch.device("meta"):
        network = build(name, **{k: v for k, v in overrides.items() if k not in of_weights})
        # what is frozen has neither gradients nor optimizer states nor an EMA
        if model.get("freeze"):
            freezing.freeze(network, model["freeze"])
        if model.get("lora"):
            inject(network, LoRA(**model["lora"]))
    return network


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


def numbers(plan: Plan, gpu: GPU, micro: int | None) -> dict[str, Any]:
    """A plan as JSON-ready data; `micro` is the recipe's micro-batch, None = the largest that divides the batch."""
    largest, fitting = plan.largest_micro_batch(gpu), plan.fitting_micro_batch(gpu)
    chosen = micro or fitting or 1
    return {
        "gpu": gpu.name,
        "devices": plan.devices,
        "parameters": plan.cost.parameters,
        "gflops_per_image": plan.cost.flops / 1e9,
        "training_gflops_per_image": plan.cost.hardware_flops / 1e9,
        "bytes": {
            **plan.parts(),
            "gradients": plan.gradients(),
            "activations, fixed part": plan.cost.fixed,
            "activations per image": plan.cost.activations,
            "evaluation step": plan.evaluation(),
        },
        "micro_batch": chosen,
        "peak_bytes": plan.peak(chosen),
        "usable_bytes": plan.usable(gpu),
        "fits": plan.peak(chosen) <= plan.usable(gpu),
        "largest_micro_batch": largest,
        "largest_fitting_micro_batch": fitting,
        "images_per_second": plan.images_per_second(gpu),
        "hours": plan.hours(gpu),
    }


def shown(recipe: str, plan: Plan, gpu: GPU, numbers: dict[str, Any]) -> str:
    """A plan in words, from its `numbers`."""
    lines = [
        f"{recipe} on {plan.devices} x {gpu.name}",
        f"  parameters          {plan.cost.parameters / 1e6:.1f} M",
        f"  FLOPs per image     {numbers['gflops_per_image']:.1f} G forward, "
        f"{numbers['training_gflops_per_image']:.1f} G in training (two per multiply-add)",
        "  memory per GPU",
    ]
    lines += [f"    {name:<28} {size / GIB:9.3f} GiB" for name, size in numbers["bytes"].items()]
    verdict = "fits" if numbers["fits"] else "does NOT fit"
    lines += [
        f"  micro-batch {numbers['micro_batch']}: peak {numbers['peak_bytes'] / GIB:.1f} GiB of "
        f"{numbers['usable_bytes'] / GIB:.1f} GiB usable: {verdict}",
        f"  largest micro-batch {numbers['largest_micro_batch']}, "
        f"largest that divides the batch of {plan.batch}: {numbers['largest_fitting_micro_batch']}",
    ]
    if not numbers["largest_fitting_micro_batch"]:
        lines.append("  nothing fits: set model.grad_checkpointing to true (--grad-checkpointing), or shard (--shards)")
    lines.append(
        f"  speed               {numbers['images_per_second']:.0f} images/s at {100 * plan.mfu:.0f} % MFU (assumed)"
    )
    if plan.steps:
        lines.append(f"  whole run           {numbers['hours']:.1f} h for {plan.steps * plan.batch / 1e6:.1f} M images")
    return "\n".join(lines)
