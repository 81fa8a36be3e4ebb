"""How well the loss at the end of training orders runs by their Fréchet distance, from the studies that were run.

    python benchmarks/loss_and_distance.py

For each study whose arms train on the same loss, all runs of all arms: Spearman's rank correlation between the Fréchet
distance and the held-out loss, the training loss, and the training loss within each band of log-SNR. 1 = the loss
orders the runs as the distance does. `all` ranks runs within their study and takes the correlation over all studies.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

RESULTS = Path(__file__).parent / "results" / "studies"
SAME_LOSS = ("unet_uvit", "scaling_at_16", "dropout_placement", "downsampling", "optimizer")
DISTANCE = "frechet:random-conv"
LEVELS = ("min -10", "-10 -5", "-5 -2", "-2 0", "0 2", "2 5", "5 10", "10 max")


def table_of(study: str) -> dict[str, np.ndarray]:
    """Values by measure, one per run."""
    arms = json.loads((RESULTS / study / "study.json").read_text())["arms"]
    runs = [values for seeds in arms.values() for values in seeds.values()]
    return {name: np.array([run[name] for run in runs]) for name in (DISTANCE, *measures())}


def measures() -> list[str]:
    """The losses."""
    return ["held-out loss", "loss", *(f"loss logsnr {level}" for level in LEVELS)]


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tables = {study: table_of(study) for study in SAME_LOSS if (RESULTS / study).is_dir()}
    names = [f"{study} ({len(t[DISTANCE])})" for study, t in tables.items()]
    print(f"{'Spearman, with the distance':<28}" + "".join(f"{name:>24}" for name in (*names, "all")))
    for measure in measures():
        each = [spearmanr(t[measure], t[DISTANCE]).statistic for t in tables.values()]
        ranks = [np.concatenate([share(t[m]) for t in tables.values()]) for m in (measure, DISTANCE)]
        row = [*each, np.corrcoef(*ranks)[0, 1]]
        print(f"{measure:<28}" + "".join(f"{value:>+24.2f}" for value in row))


def share(values: np.ndarray) -> np.ndarray:
    """Ranks, from -1 to 1, so that studies with more runs do not weigh more per run."""
    return 2 * (rankdata(values) - 1) / (len(values) - 1) - 1


if __name__ == "__main__":
    main()
