"""`diffzoo plan`: the memory and time that a recipe needs, before it is started."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError
from diffzoo.recipe.parse import parse_recipe, read_recipe, split_settings

if TYPE_CHECKING:
    from diffzoo.training.gpus import GPU
    from diffzoo.training.planning import Plan

__all__ = ["configure", "run", "split_settings"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = "diffzoo plan RECIPE | -c RECIPE [-c OVERLAY ...] [--key value ...] [options]"
    parser.epilog = (
        "Settings of the recipe follow as for `diffzoo fit`: --trainer.KEY, --model.KEY, --data.KEY, for example "
        "--data.init_args.micro_batch_size 8."
    )
    parser.add_argument("recipe", nargs="?", help="a file, or a name that ships (`diffzoo recipes list`)")
    parser.add_argument("-c", "--config", action="append", default=[], help="the same; later ones win, as for `fit`")
    parser.add_argument("--data.folder", dest="folder", help="plan for a folder of images, as for `fit`")
    parser.add_argument(
        "--gpu", help="h100, h200, a100-80, l40s, rtx4090, ...; default: the one of this machine, or h100"
    )
    parser.add_argument("--devices", type=int, help="number of GPUs; default: trainer.devices where it is stated, or 1")
    parser.add_argument(
        "--shards",
        type=int,
        help="GPUs that share weights and optimizer by FSDP2; default: all with ModelParallelStrategy, else 1",
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of the peak FLOPs (default 0.35)")
    parser.add_argument("--grad-checkpointing", action="store_true", help="plan with recomputed activations")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from diffzoo.training.gpus import find_gpu, present_gpu
    from diffzoo.training.recipe_plan import plan_content

    stated = [n for n in (args.devices, args.shards) if n is not None]
    if min(stated, default=1) < 1 or not 0 < args.mfu <= 1:
        raise UserError("--devices and --shards must be at least 1, --mfu must lie in (0, 1]")
    names = [*([args.recipe] if args.recipe else []), *args.config]
    if not names:
        raise UserError("no recipe: give a file or a name that ships, `diffzoo recipes list` shows all")
    gpu = find_gpu(args.gpu) if args.gpu else present_gpu() or find_gpu("h100")
    shown = " + ".join(names)
    plain = len(names) == 1 and not args.settings and not args.folder
    content = read_recipe(names[0]) if plain else parse_recipe(names, args.settings, args.folder)
    trainer = content.get("trainer") or {}
    devices = args.devices or _devices(trainer)
    shards = args.shards or (devices if "ModelParallelStrategy" in str(trainer.get("strategy")) else 1)
    plan, micro = plan_content(content, shown, devices, shards, args.mfu, args.grad_checkpointing)
    numbers = _numbers(plan, gpu, micro)
    print(json.dumps(numbers, indent=1) if args.json else _text(shown, plan, gpu, numbers))
    return 0


def _devices(trainer: dict[str, Any]) -> int:
    """How many a trainer states; one where it leaves them to the machine."""
    if trainer.get("devices", "auto") in ("auto", -1, "-1", None):
        return 1
    from diffzoo.recipe.command import world_size

    return world_size(trainer)


def _numbers(plan: "Plan", gpu: "GPU", micro: int | None) -> dict[str, Any]:
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


def _text(recipe: str, plan: "Plan", gpu: "GPU", numbers: dict[str, Any]) -> str:
    gib = 2**30
    lines = [
        f"{recipe} on {plan.devices} x {gpu.name}",
        f"  parameters          {plan.cost.parameters / 1e6:.1f} M",
        f"  FLOPs per image     {numbers['gflops_per_image']:.1f} G forward, "
        f"{numbers['training_gflops_per_image']:.1f} G in training (two per multiply-add)",
        "  memory per GPU",
    ]
    lines += [f"    {name:<28} {size / gib:9.3f} GiB" for name, size in numbers["bytes"].items()]
    verdict = "fits" if numbers["fits"] else "does NOT fit"
    lines += [
        f"  micro-batch {numbers['micro_batch']}: peak {numbers['peak_bytes'] / gib:.1f} GiB of "
        f"{numbers['usable_bytes'] / gib:.1f} GiB usable: {verdict}",
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
