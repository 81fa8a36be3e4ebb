"""`diffzoo compare SOURCE [SOURCE ...]`: settings, samplers, runs or EMA widths side by side on the same seeds."""

import argparse
from typing import TYPE_CHECKING

from diffzoo.cli.eval_options import sampling_arguments
from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.generation.published import Speed

__all__ = ["configure", "run"]

MOST_COLUMNS = 24


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = "One sheet: a row for each class and seed, a column for each combination of what is varied."
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="published names, run directories, files")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names, numbers or captions; default: the first")
    parser.add_argument("--seeds", default="0-3", help='such as "0-7" or "0-15,20" (default: 0-3)')
    parser.add_argument("--weights", nargs="+", default=["ema"], help="ema, raw, or labels of EMAs")
    parser.add_argument("--sampler", nargs="+", default=[None], metavar="NAME", help="names of samplers")
    parser.add_argument("--steps", nargs="+", type=int, default=[None], metavar="N", help="of the sampler")
    parser.add_argument("--guidance", nargs="+", type=float, default=[None], metavar="W", help="strengths")
    parser.add_argument("--out", default="compare.png", help="the sheet: .png, .webp or .jpg (default: compare.png)")
    sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Sample, write, and print where."""
    from diffzoo.generation.compare import compare, every_way
    from diffzoo.generation.seeds import bounded, parse_seeds
    from diffzoo.images import check_format

    check_format(args.out)
    seeds = parse_seeds(args.seeds)
    ways = every_way(args.sources, args.weights, args.sampler, args.steps, args.guidance)
    if len(ways) > MOST_COLUMNS:
        raise UserError(f"{len(ways)} combinations are more than a sheet shows, {MOST_COLUMNS}: vary fewer things")
    bounded(len(ways) * len(seeds) * len(args.classes or [0]))
    speed: Speed = {"batch_size": args.batch_size, "precision": args.precision, "progress": not args.quiet}
    sheet = compare(ways, args.classes, seeds, args.device, **speed)
    print(f"{sheet.save_grid(args.out)}: {len(sheet)} images, columns: {'; '.join(filter(None, sheet.heads)) or 'one'}")
    return 0
