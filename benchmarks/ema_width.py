"""An EMA of a fixed decay against the power-function family: held-out loss of the runs of a study, by width.

    diffzoo study studies/optimizer --out study
    python benchmarks/ema_width.py study

Every run kept power-function EMAs, from which `diffzoo ema sweep` reconstructs other widths. A row has the mean loss of
each arm, and the mean difference from the row of the fixed decay over all runs with its 95 % interval, pair by pair.
"""

import argparse
import contextlib
import io
from pathlib import Path

from diffzoo.recipe.ema_sweep import sweep_widths
from diffzoo.study.report import compare_arms

WIDTHS = [0.03, 0.05, 0.075, 0.1, 0.15]
SINGLE = "ema_0.999"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study whose runs keep snapshots of their EMAs")
    parser.add_argument("--batches", type=int, default=8, help="validation batches (default %(default)s)")
    args = parser.parse_args()
    arms: dict[str, list[dict[str, float]]] = {}
    for run in sorted(args.study.glob("*/seed-*/run")):
        with contextlib.redirect_stdout(io.StringIO()):
            losses = sweep_widths(str(run), WIDTHS, batches=args.batches)
        arms.setdefault(run.parents[1].name, []).append(losses)
    runs = [losses for arm in arms.values() for losses in arm]
    print(f"{'':<12}" + "".join(f"{name:>14}" for name in arms) + f"{'against ' + SINGLE:>24}")
    for label in runs[0]:
        means = (sum(losses[label] for losses in arm) / len(arm) for arm in arms.values())
        found = compare_arms(*({i: losses[k] for i, losses in enumerate(runs)} for k in (label, SINGLE)))
        against = "" if label == SINGLE or found is None else f"{found.mean:+.5f} ± {found.half_width:.5f}"
        print(f"{label:<12}" + "".join(f"{mean:>14.5f}" for mean in means) + f"{against:>24}")


if __name__ == "__main__":
    main()
