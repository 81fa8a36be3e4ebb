"""When the memory of a device runs out in training: what `diffzoo plan` would have said, and the nearest setting."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.training.planning import GPU, Plan

__all__ = ["advice", "memory_explained"]

GIB = 2**30


@contextmanager
def memory_explained(arguments: Sequence[str]) -> Iterator[None]:
    """Turn "out of memory" inside the block into a sentence that says which setting fits.

    Args:
        arguments: of `diffzoo.cli.lightning_cli.Command`, whose recipe was running.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_sentence(arguments)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the host
            raise
        raise UserError("the memory of this machine ran out: take a smaller data.init_args.micro_batch_size") from error


def _sentence(arguments: Sequence[str]) -> str:
    """What to change, from the recipe as it was parsed."""
    from diffzoo.cli.lightning_cli import ParsedRecipe, world_size
    from diffzoo.cli.plan import plan_content

    config = ParsedRecipe(list(arguments)).config
    content = config[arguments[0]].as_dict()
    trainer = content["trainer"]
    devices = world_size(trainer)
    sharded = "ModelParallelStrategy" in str(trainer.get("strategy"))
    try:
        gpu = this_gpu()
        plans = [
            plan_content(content, "the recipe", devices, devices if sharded else 1, recompute=again)[0]
            for again in (False, True)
        ]
    except UserError as error:  # a network that is no registered name
        return f"the device ran out of memory: take a smaller data.init_args.micro_batch_size (no plan: {error})"
    micro = (content["data"].get("init_args") or {}).get("micro_batch_size")
    share = max(1, plans[0].batch // devices)
    return advice(plans[0], plans[1], gpu, min(int(micro or share), share))


def this_gpu() -> "GPU":
    """The card of this machine; one that is not in the table is known by its memory."""
    import torch

    from diffzoo.training.planning import GPU, present_gpu

    known = present_gpu()
    if known is not None:
        return known
    properties = torch.cuda.get_device_properties(0)
    return GPU(properties.name, properties.total_memory, 100, 0)


def advice(plan: "Plan", recomputing: "Plan", gpu: "GPU", micro: int) -> str:
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
