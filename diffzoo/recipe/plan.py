"""From a recipe to its plan, and from a plan to advice when the memory of a device runs out."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

import diffzoo.models  # noqa: F401  registers the names
from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.models.registry import build
from diffzoo.recipe.parse import section
from diffzoo.training import freezing
from diffzoo.training.gpus import GIB, GPU
from diffzoo.training.lora import LoRA, inject
from diffzoo.training.planning import Plan, network_cost

__all__ = ["advice", "network_of", "numbers", "plan_content", "shown"]

# millions of parameters of frozen encoders, which are kept in float32
FROZEN = {"KLAutoencoder": 84, "CLIPEncoder": 123, "MiniLMEncoder": 23, "T5Encoder": 4762}


def plan_content(
    content: Mapping[str, object],
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
    model, trainer, data = section(content, "model"), section(content, "trainer"), section(content, "data", "init_args")
    devices = devices or _devices(trainer)
    network = network_of(model, where)
    network.set_grad_checkpointing(recompute or model.get("grad_checkpointing") or False)
    plan = Plan(
        cost=network_cost(network, half="16" in str(trainer.get("precision", "32"))),
        optimizer_states=_states(model.get("optimizer")),
        averages=_emas(trainer.get("callbacks")),
        frozen_encoders=sum(4e6 * FROZEN.get(_class(model.get(k))[0], 0) for k in ("autoencoder", "text_encoder")),
        batch=int(data.get("batch_size", 64)),
        steps=max(0, int(trainer.get("max_steps", 0) or 0)),
        devices=devices,
        shards=shards or (devices if "ModelParallelStrategy" in str(trainer.get("strategy")) else 1),
        mfu=mfu,
    )
    micro = data.get("micro_batch_size")
    return plan, None if micro is None else int(micro)


def _devices(trainer: Mapping[str, object]) -> int:
    if trainer.get("devices", "auto") in ("auto", -1, "-1", None):
        return 1
    from diffzoo.recipe.command import world_size

    return world_size(trainer)


def network_of(model: Mapping[str, object], where: str) -> Network:
    """The network of a recipe on the device "meta", with adapters, and frozen as the recipe says.

    `model` is the recipe's section of this name; `where` it came from is for messages.
    """
    stated = model.get("network")
    if isinstance(stated, str):
        name, overrides = stated, dict(section(model, "network_args"))
    else:  # `create_model` as a class of version 0.1
        overrides = dict(section(stated, "init_args"))
        name = overrides.pop("name", "")
        overrides |= {**(overrides.pop("overrides", None) or {}), **section(stated, "dict_kwargs")}
    if not name:
        raise UserError(f"the recipe {where} states no registered network: expected model.network, a name")
    of_weights = ("pretrained", "checkpoint_path", "classes", "class_names")
    with torch.device("meta"):
        network = build(name, **{k: v for k, v in overrides.items() if k not in of_weights})
        # what is frozen has neither gradients nor optimizer states nor an EMA
        if model.get("freeze"):
            freezing.freeze(network, cast(str | list[str], model["freeze"]))
        if model.get("lora"):
            inject(network, LoRA(**section(model, "lora")))
    return network


def _class(part: object) -> tuple[str, Mapping[str, Any]]:
    """Short class name and arguments of an entry of a recipe."""
    path = part if isinstance(part, str) else section(part).get("class_path", "")
    return str(path).rpartition(".")[2], section(part, "init_args")


def _states(optimizer: object) -> int:
    """Tensors of the size of the weights: the two moments of Adam and its kin, one for those with momentum alone."""
    kind, arguments = _class(optimizer)
    name = str(arguments.get("name", kind)).lower()
    return 1 if any(n in name for n in ("lion", "muon", "sgd")) else 2


def _emas(callbacks: Iterable[object] | None) -> int:
    for kind, arguments in map(_class, callbacks or ()):
        if kind == "EMA":
            return len(arguments.get("decays", [0.9999])) + len(arguments.get("stds", []))
    return 0


def advice(plan: Plan, recomputing: Plan, gpu: GPU, micro: int) -> str:
    """One sentence: what the plan says of `micro` images at once on a card, and the nearest setting that fits.

    `recomputing` is the plan of the same recipe with activations recomputed.
    """
    share = max(1, plan.batch // plan.devices)
    needed, usable = plan.peak(micro) / GIB, gpu.usable / GIB
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


def numbers(plan: Plan, gpu: GPU, micro: int | None) -> dict[str, object]:
    """A plan as JSON-ready data; `micro` is the recipe's micro-batch, None = the largest that divides the batch."""
    fitting = plan.fitting_micro_batch(gpu)
    chosen = micro or fitting or 1
    return {
        "gpu": gpu.name,
        "devices": plan.devices,
        "parameters": plan.cost.parameters,
        "gflops_per_image": plan.cost.flops / 1e9,
        "training_gflops_per_image": plan.cost.hardware_flops / 1e9,
        "bytes": _bytes(plan),
        "micro_batch": chosen,
        "peak_bytes": plan.peak(chosen),
        "usable_bytes": gpu.usable,
        "fits": plan.peak(chosen) <= gpu.usable,
        "largest_micro_batch": plan.largest_micro_batch(gpu),
        "largest_fitting_micro_batch": fitting,
        "images_per_second": plan.images_per_second(gpu),
        "hours": plan.hours(gpu),
    }


def _bytes(plan: Plan) -> dict[str, float]:
    return {
        **plan.parts(),
        "gradients": plan.gradients(),
        "activations, fixed part": plan.cost.fixed,
        "activations per image": plan.cost.activations,
        "evaluation step": plan.evaluation(),
    }


def shown(recipe: str, plan: Plan, gpu: GPU, micro: int | None) -> str:
    """The same in words."""
    cost, fitting = plan.cost, plan.fitting_micro_batch(gpu)
    chosen = micro or fitting or 1
    peak, usable = plan.peak(chosen), gpu.usable
    lines = [
        f"{recipe} on {plan.devices} x {gpu.name}",
        f"  parameters          {cost.parameters / 1e6:.1f} M",
        f"  FLOPs per image     {cost.flops / 1e9:.1f} G forward, {cost.hardware_flops / 1e9:.1f} G in training "
        "(two per multiply-add)",
        "  memory per GPU",
        *(f"    {name:<28} {size / GIB:9.3f} GiB" for name, size in _bytes(plan).items()),
        f"  micro-batch {chosen}: peak {peak / GIB:.1f} GiB of {usable / GIB:.1f} GiB usable: "
        f"{'fits' if peak <= usable else 'does NOT fit'}",
        f"  largest micro-batch {plan.largest_micro_batch(gpu)}, "
        f"largest that divides the batch of {plan.batch}: {fitting}",
    ]
    if not fitting:
        lines.append("  nothing fits: set model.grad_checkpointing to true (--grad-checkpointing), or shard (--shards)")
    speed = plan.images_per_second(gpu)
    lines.append(f"  speed               {speed:.0f} images/s at {100 * plan.mfu:.0f} % MFU (assumed)")
    if plan.steps:
        millions = plan.steps * plan.batch / 1e6
        lines.append(f"  whole run           {plan.hours(gpu):.1f} h for {millions:.1f} M images")
    return "\n".join(lines)
