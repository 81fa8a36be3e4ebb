"""`diffzoo plan`: the memory and time that a recipe needs, before it is started."""

import argparse
import json

from diffzoo.errors import UserError
from diffzoo.recipe.parse import parse_recipe, read_recipe, split_settings

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
    parser.add_argument("--gpu", help="h100, a100-80, rtx4090, ...; default: the one of this machine, or h100")
    parser.add_argument("--devices", type=int, help="number of GPUs; default: trainer.devices where it is stated, or 1")
    shards = "GPUs that share weights and optimizer by FSDP2; default: all with ModelParallelStrategy, else 1"
    parser.add_argument("--shards", type=int, help=shards)
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of the peak FLOPs (default 0.35)")
    parser.add_argument("--grad-checkpointing", action="store_true", help="plan with recomputed activations")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from diffzoo.recipe.plan import numbers, plan_content, shown
    from diffzoo.training.gpus import find_gpu, present_gpu

    stated = [n for n in (args.devices, args.shards) if n is not None]
    if min(stated, default=1) < 1 or not 0 < args.mfu <= 1:
        raise UserError("--devices and --shards must be at least 1, --mfu must lie in (0, 1]")
    names = [*([args.recipe] if args.recipe else []), *args.config]
    if not names:
        raise UserError("no recipe: give a file or a name that ships, `diffzoo recipes list` shows all")
    gpu = find_gpu(args.gpu) if args.gpu else present_gpu() or find_gpu("h100")
    plain = len(names) == 1 and not args.settings and not args.folder
    content = read_recipe(names[0]) if plain else parse_recipe(names, args.settings, args.folder)
    named, recompute = " + ".join(names), args.grad_checkpointing
    plan, micro = plan_content(content, named, args.devices, args.shards, args.mfu, recompute)
    print(json.dumps(numbers(plan, gpu, micro), indent=1) if args.json else shown(named, plan, gpu, micro))
    return 0
