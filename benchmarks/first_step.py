"""CPU seconds from the command line to the first optimizer step of a run, of two checkouts in turns.

    git worktree add ../before COMMIT
    python benchmarks/first_step.py ../before .

Each turn starts `diffzoo fit` on a recipe in a process of its own, which ends after its first step and prints the
seconds, user and system, that it has used: the clock of a machine that does other things at the same time tells less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CALLBACK = """
import os, resource
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, *args):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"used {used.ru_utime + used.ru_stime:.3f}", flush=True)
        os._exit(0)
"""


def seconds(checkout: Path, recipe: str) -> float:
    """CPU seconds that one run of a checkout takes to its first step, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "first_step_callback.py").write_text(CALLBACK)
        command = [sys.executable, "-m", "diffzoo", "fit", "-c", recipe, "--run", f"{folder}/run"]
        command += ["--trainer.accelerator", "cpu", "--trainer.callbacks+=first_step_callback.FirstStep"]
        paths = {"PYTHONPATH": f"{checkout.resolve()}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env={**os.environ, **paths}, cwd=folder, capture_output=True, text=True)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("used ")]
    if not found:
        raise SystemExit(f"{checkout}: no first step\n{done.stderr[-2000:]}")
    return float(found[0])


def main() -> None:
    """Alternate, and print medians and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, help="checkout that is measured")
    parser.add_argument("--recipe", default="emoji/simple_uvit_xs_32")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    both = (args.before, args.after)
    for checkout in both:  # compiles what is not compiled yet
        seconds(checkout, args.recipe)
    pairs = [tuple(seconds(checkout, args.recipe) for checkout in both) for _ in range(args.turns)]
    for name, column in zip(("before", "after"), zip(*pairs, strict=True), strict=True):
        print(f"{name:<7} {statistics.median(column):.2f} s  ({min(column):.2f} to {max(column):.2f})")
    ratios = [after / before for before, after in pairs]
    print(f"ratio   {statistics.median(ratios):.2f}    ({min(ratios):.2f} to {max(ratios):.2f}; {args.recipe})")


if __name__ == "__main__":
    main()
