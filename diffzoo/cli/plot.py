"""`diffzoo plot schedule NAME [NAME ...]`: log-SNR, alpha, sigma and weighting of processes, drawn together."""

import argparse
from pathlib import Path

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", choices=["schedule"])
    parser.add_argument("names", nargs="+", metavar="NAME", help="recipes, their files, runs, or published weights")
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), help=".png or .svg (default: schedule.png)")


def run(args: argparse.Namespace) -> int:
    """Draw, and print where."""
    from diffzoo.plot import Curve, plot_schedules
    from diffzoo.recipe.stated import stated_process

    print(f"plot: {plot_schedules({name: Curve(*stated_process(name)) for name in args.names}, args.out)}")
    return 0
