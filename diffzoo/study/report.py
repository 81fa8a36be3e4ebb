"""What a study found: a table, paired differences, a verdict for each claim, a plot for each measure.

Two arms are compared seed by seed: the same seed gives both the same data order, noise and initial numbers as far as
their networks agree. The mean difference has a Student interval of 95 %. A claim *holds* if the interval lies on its
side of zero, *does not hold* if it lies on the other, and is *undecided at this budget* else.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.study.health import FEWEST, curve_of, write_curve
from diffzoo.study.runner import Job, Measured, measured
from diffzoo.study.spec import Claim, Study

__all__ = ["Difference", "Verdict", "compare_arms", "judge", "write_report"]

Results = Mapping[str, Mapping[int, Measured]]  # by arm and seed


@dataclass(frozen=True)
class Difference:
    """`first` minus `second`: the mean over the `seeds` that both have, ± half the 95 % interval (infinite for one)."""

    mean: float
    half_width: float
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """A claim, judged: "holds", "does not hold" or "undecided at this budget"."""

    claim: Claim
    word: str
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.claim.says}: {self.word} (no seed has both arms)"
        d = self.difference
        what = f"{self.claim.measure} of {self.claim.lower} minus that of {self.claim.than}"
        width = f" ± {d.half_width:.2g}, {d.seeds} seeds" if d.seeds > 1 else ", one seed"
        return f"{self.claim.says}: {self.word} ({what}: {d.mean:+.4g}{width})"


def compare_arms(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """The paired difference of two arms, by seed; None if they share no seed."""
    from scipy.stats import t

    pairs = [first[seed] - second[seed] for seed in first if seed in second]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], math.inf, 1)
    half = float(t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean(pairs), half, len(pairs))


def judge(claim: Claim, results: Results) -> Verdict:
    """The verdict on a claim.

    Raises:
        UserError: if no run has the measure of the claim, listing those that there are.
    """
    of = {arm: _column(results[arm], claim.measure) for arm in (claim.lower, claim.than)}
    known = _measures(results)
    if known and claim.measure not in known:
        raise UserError(f"claims: no measure is called {claim.measure!r}; there are {', '.join(known)}")
    difference = compare_arms(of[claim.lower], of[claim.than])
    if difference is None or abs(difference.mean) <= difference.half_width:
        return Verdict(claim, "undecided at this budget", difference)
    return Verdict(claim, "holds" if difference.mean < 0 else "does not hold", difference)


def write_report(study: Study, jobs: Sequence[Job], out: Path) -> str:
    """Write `study.json`, `study.md` and the plots into `out`; returns the Markdown.

    Runs that are not finished are left out and counted.
    """
    results: dict[str, dict[int, Measured]] = {arm: {} for arm in study.arms}
    for job in jobs:
        found = measured(job)
        if found is not None:
            results[job.arm][job.seed] = found
    verdicts = [judge(claim, results) for claim in study.claims]
    text = _markdown(study, jobs, results, verdicts)
    write_text(out / "study.md", text)
    write_text(out / "study.json", json.dumps(_data(study, jobs, results, verdicts), indent=1, sort_keys=True) + "\n")
    for measure in _measures(results):
        _plot(study, results, measure, out)
    _write_curves(study, jobs, results, out)
    return text


def _write_curves(study: Study, jobs: Sequence[Job], results: Results, out: Path) -> None:
    """`curves/ARM.json` for every arm with enough finished seeds: `diffzoo study check RUN --against` reads them."""
    for arm, runs in results.items():
        mine = [job for job in jobs if job.arm == arm and job.seed in runs and not runs[job.seed].failure]
        if len(mine) >= FEWEST:
            curve = curve_of(f"{study.title}: {arm}", [job.folder / "run" for job in mine])
            write_curve(curve, out / "curves" / f"{mine[0].folder.parent.name}.json")


def _column(runs: Mapping[int, Measured], measure: str) -> dict[int, float]:
    return {seed: run.columns[measure] for seed, run in sorted(runs.items()) if measure in run.columns}


def _measures(results: Results) -> list[str]:
    """All measures that some run has, in the order in which runs name them."""
    return list(dict.fromkeys(name for runs in results.values() for run in runs.values() for name in run.columns))


def _cell(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    low, high = min(values.values()), max(values.values())
    return f"{mean(values.values()):.4g} ({low:.4g}–{high:.4g})" if len(values) > 1 else f"{low:.4g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(study: Study, jobs: Sequence[Job], results: Results, verdicts: Sequence[Verdict]) -> str:
    columns = [name for name in _measures(results) if not name.startswith("loss logsnr")]
    lines = [f"# {study.title}", "", f"Source: {study.source}. Base recipe: `{study.base}`."]
    lines += [study.note] if study.note else []
    lines += ["", "Mean over seeds, with the range in brackets.", ""]
    lines += [_row(["arm", "steps", "seeds", *columns]), "|---|---:|---:|" + "---:|" * len(columns)]
    steps = {job.arm: job.steps for job in jobs}
    for arm, runs in results.items():
        ended = sum(not run.failure for run in runs.values())
        cells = [_cell(_column(runs, name)) for name in columns]
        lines.append(_row([arm, str(steps[arm]), f"{ended} of {len(study.seeds)}", *cells]))
    failed = [(arm, seed, run.failure) for arm, runs in results.items() for seed, run in runs.items() if run.failure]
    if failed:
        lines += ["", "Runs that ended early:", "", *(f"- {arm}, seed {seed}: {why}" for arm, seed, why in failed)]
    if verdicts:
        lines += ["", "Claims of the source:", "", *(f"- {verdict}" for verdict in verdicts)]
    return "\n".join(lines) + "\n"


def _data(study: Study, jobs: Sequence[Job], results: Results, verdicts: Sequence[Verdict]) -> dict[str, object]:
    """All but the speed, which differs from run to run, as JSON-ready data: equal for equal results."""
    return {
        "title": study.title,
        "source": study.source,
        "base": study.base,
        "steps": {job.arm: job.steps for job in jobs},
        "arms": {
            arm: {
                str(seed): {"failure": run.failure} if run.failure else dict(run.values) for seed, run in runs.items()
            }
            for arm, runs in results.items()
        },
        "verdicts": [
            {"says": v.claim.says, "verdict": v.word, "measure": v.claim.measure, **_difference(v.difference)}
            for v in verdicts
        ],
    }


def _difference(found: Difference | None) -> dict[str, float]:
    if found is None:
        return {}
    width = {"half_width": found.half_width} if found.seeds > 1 else {}
    return {"difference": found.mean, "seeds": found.seeds, **width}


def _plot(study: Study, results: Results, measure: str, out: Path) -> None:
    """One measure: a point for every seed, a bar at the mean of every arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.1 * len(results), 3.2), layout="constrained")
    axes = figure.subplots()
    for place, runs in enumerate(results.values()):
        values = list(_column(runs, measure).values())
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6, markersize=5)
        if values:
            axes.hlines(mean(values), place - 0.25, place + 0.25, color="tab:orange", linewidth=2)
    axes.set_xticks(range(len(results)), list(results), rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(measure)
    axes.set_title(study.title, fontsize=10)
    name = "".join(c if c.isalnum() else "-" for c in measure)
    for ending in ("png", "svg"):
        figure.savefig(out / f"{name}.{ending}", dpi=150)
