"""`diffzoo ema`: weight averages that were not kept, made after training from the snapshots of those that were."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError
from diffzoo.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["configure", "run"]

WIDTHS = [0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs `reconstruct` and `sweep`."""
    verbs = parser.add_subparsers(dest="action", required=True)
    make = verbs.add_parser("reconstruct", help="write averages of given relative widths as safetensors")
    make.add_argument("--std", type=float, nargs="+", required=True, help="relative widths, such as 0.05 0.10")
    make.add_argument("-o", "--output", help="folder; default RUN/averages/reconstructed")
    sweep = verbs.add_parser("sweep", help="loss on held-out data over a grid of widths, and the best")
    sweep.add_argument("--std", type=float, nargs="+", default=WIDTHS, help="relative widths of the grid")
    sweep.add_argument("--batches", type=int, default=16, help="validation batches per width (default 16)")
    for sub in (make, sweep):
        sub.add_argument("run", help="directory of the run")
        sub.add_argument(
            "--updates", type=int, help="time of the average in optimizer steps; default the last snapshot"
        )


def run(args: argparse.Namespace) -> int:
    """Reconstruct or sweep."""
    return _reconstruct(args) if args.action == "reconstruct" else _sweep(args)


def _reconstruct(args: argparse.Namespace) -> int:
    from diffzoo.training.reconstruction import write_reconstructed

    write_reconstructed(args.run, args.std, args.updates, args.output)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from diffzoo.training.reconstruction import REACHED, list_snapshots, mismatch, reconstruct

    config = Run(Path(args.run)).config
    if not config.is_file():
        raise UserError(f"no config.yaml in {args.run}: `ema sweep` needs the directory of a run, to know its data")
    snapshots = list_snapshots(args.run)
    end = args.updates or max(s.updates for s in snapshots)
    used = [(s.updates, s.std) for s in snapshots if s.updates <= end]
    measure = _Measure(args.run, config, args.batches)
    results = []
    for std in args.std:
        loss = measure(reconstruct(snapshots, std, end))
        results.append((loss, std))
        off = mismatch(used, end, std)
        note = f"  (not reached: the profile is off by {100 * off:.2g} %)" if off > REACHED else ""
        print(f"width {std:<6g} loss {loss:.6f}{note}", flush=True)
    loss, std = min(results)
    print(f"best: width {std:g}, loss {loss:.6f}. Write it with `diffzoo ema reconstruct {args.run} --std {std:g}`")
    print("The loss is a proxy: compare widths near it by Fréchet distance with `diffzoo eval`")
    return 0


class _Measure:
    """Validation loss of given weights, on the data of a run."""

    def __init__(self, run: str, config: Path, batches: int):
        from diffzoo.recipe.command import Command
        from diffzoo.training.ema import EMA
        from diffzoo.zoo.loading import locate

        class Built(Command):
            """Everything built, nothing run."""

            def _run_subcommand(self, subcommand: str) -> None:
                """Nothing."""

        options = ["--trainer.logger=false", f"--trainer.limit_val_batches={batches}"]
        self.cli = Built(["fit", f"--config={config}", *options])
        callbacks: list[Any] = self.cli.trainer.callbacks  # type: ignore[attr-defined]
        # it would put its own average in place of the one that is measured
        callbacks[:] = [c for c in callbacks if not isinstance(c, EMA)]
        self.cli.model.network.load_state_dict(locate(run, "raw").state)

    def __call__(self, tensors: "dict[str, Tensor]") -> float:
        network = self.cli.model.network
        network.load_state_dict(network.state_dict() | tensors)
        found = self.cli.trainer.validate(self.cli.model, self.cli.datamodule, verbose=False)
        if not found or "val/loss" not in found[0]:
            raise UserError("this run's data has no held-out part: `ema sweep` has nothing to measure on")
        return float(found[0]["val/loss"])
