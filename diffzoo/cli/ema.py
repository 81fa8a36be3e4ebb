"""`diffzoo ema`: EMAs of other widths, reconstructed after training from the snapshots of those that were kept."""

import argparse

__all__ = ["configure", "run"]

WIDTHS = [0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs `reconstruct` and `sweep`."""
    verbs = parser.add_subparsers(dest="action", required=True)
    make = verbs.add_parser("reconstruct", help="write EMAs of given relative widths as safetensors")
    make.add_argument("--std", type=float, nargs="+", required=True, help="relative widths, such as 0.05 0.10")
    make.add_argument("-o", "--output", help="folder; default RUN/averages/reconstructed")
    sweep = verbs.add_parser("sweep", help="loss on held-out data over a grid of widths, and the best")
    sweep.add_argument("--std", type=float, nargs="+", default=WIDTHS, help="relative widths of the grid")
    sweep.add_argument("--batches", type=int, default=16, help="validation batches per width (default 16)")
    for sub in (make, sweep):
        sub.add_argument("run", help="directory of the run")
        sub.add_argument("--updates", type=int, help="optimizer step of the EMA; default: that of the last snapshot")


def run(args: argparse.Namespace) -> int:
    """Reconstruct or sweep."""
    if args.action == "reconstruct":
        from diffzoo.training.reconstruction import write_reconstructed

        write_reconstructed(args.run, args.std, args.updates, args.output)
    else:
        from diffzoo.recipe.ema_sweep import sweep_widths

        sweep_widths(args.run, args.std, args.updates, args.batches)
    return 0
