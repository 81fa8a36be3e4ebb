"""Search guidance scale and interval with common random numbers.

All candidates draw the same images from the same seeds, so that their differences are differences of guidance and not
of luck. A candidate whose value after a part of the images lies clearly above the best is given up.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

from diffzoo.errors import UserError
from diffzoo.evaluation.measure import metric_of
from diffzoo.evaluation.records import EvalProtocol, SamplePlan, digest
from diffzoo.evaluation.reference import Reference
from diffzoo.evaluation.result import Result
from diffzoo.evaluation.run import Settings, evaluate
from diffzoo.files import atomic_path, write_text

__all__ = ["KEEP", "Candidate", "Trial", "candidates", "no_guidance", "plot", "sweep_guidance", "table", "write_plan"]

KEEP: Literal["keep"] = "keep"
Interval = tuple[float, float] | Literal["keep"] | None
HIGHER_IS_BETTER = ("inception-score", "precision", "recall", "density", "coverage", "clip-score")


def no_guidance(base: SamplePlan) -> float:
    """The scale that means none in the plan's formula: 1 in "uncond", 0 in "cond" and of a classifier."""
    guidance = base.guidance or {}
    return 0.0 if guidance.get("formula") == "cond" or "classifier" in guidance else 1.0


@dataclass(frozen=True)
class Candidate:
    """One setting of the sweep.

    Args:
        scale: of guidance.
        interval: where it acts, in t; None = everywhere; "keep" = as the base plan has it.
        average: label of the weight average, or the file of a reconstructed one; None = that of the base plan.
    """

    scale: float
    interval: Interval = None
    average: str | None = None

    def plan(self, base: SamplePlan) -> SamplePlan:
        """The base plan with this guidance and average."""
        if self.average is not None:
            model, label = (self.average, "average") if self._is_file else (base.model, self.average)
            base = replace(base, model=model, average=label, weights_sha256=None)
        if self.scale == no_guidance(base):
            return replace(base, guidance=None)
        guidance: dict[str, Any] = {**(base.guidance or {"formula": "uncond"}), "scale": self.scale}
        if "classifier" in guidance and self.interval not in (None, KEEP):
            raise UserError("a classifier guides at all times: leave the intervals out of this sweep")
        if self.interval != KEEP:
            guidance.pop("interval", None)
            if self.interval is not None:
                guidance["interval"] = {"low": self.interval[0], "high": self.interval[1], "unit": "t"}
        return replace(base, guidance=guidance)

    @property
    def weights(self) -> str:
        """The average in words."""
        return Path(self.average).stem if self.average and self._is_file else self.average or "as planned"

    @property
    def _is_file(self) -> bool:
        return (self.average or "").endswith(".safetensors")

    @property
    def where(self) -> str:
        """The interval in words."""
        if self.interval is None:
            return "everywhere"
        return "where the plan says" if self.interval == KEEP else "t in [{:g}, {:g}]".format(*self.interval)

    def __str__(self) -> str:
        return f"scale {self.scale:g}, {self.where}" + (f", {self.weights}" if self.average else "")


@dataclass(frozen=True)
class Trial:
    """A candidate and what came of it.

    Args:
        candidate: the setting.
        plan: its plan, with the hash of its weights.
        value: of the metric, from `n` images.
        n: images it was given before it was finished or given up.
        finished: whether it got all of them.
        values: of all metrics of the protocol.
    """

    candidate: Candidate
    plan: SamplePlan
    value: float
    n: int
    finished: bool
    values: Mapping[str, float]


def candidates(
    scales: Sequence[float],
    intervals: Sequence[Interval] = (None,),
    averages: Sequence[str | None] = (None,),
    none: float = 1.0,
) -> list[Candidate]:
    """All combinations; the scale `none`, no guidance, has no interval."""
    if not scales:
        raise UserError("a sweep needs at least one guidance scale, for example --scales 1 1.5 2")
    found = dict.fromkeys(Candidate(s, None if s == none else i, a) for a, s, i in product(averages, scales, intervals))
    return list(found)


Run = Callable[[Candidate, int], Result]


def _runner(
    source: Callable[[SamplePlan], Any],
    base: SamplePlan,
    protocol: EvalProtocol,
    reference: Reference,
    settings: Settings,
) -> Run:
    def run(candidate: Candidate, n: int) -> Result:
        plan = candidate.plan(base)
        folder = Path(settings.out) / "candidates" / digest(plan)[:12]
        # a first part serves to rank: it may be too small for a value that is worth printing
        few = settings.few or n < protocol.n
        mine = replace(settings, out=folder, few=few)
        return evaluate(source(plan), protocol.with_(n=n), reference, mine)

    return run


def sweep_guidance(
    source: Callable[[SamplePlan], Any],
    base: SamplePlan,
    protocol: EvalProtocol,
    reference: Reference,
    tried: Sequence[Candidate],
    settings: Settings,
    *,
    metric: str | None = None,
    first_part: float = 0.2,
    margin: float = 0.1,
    report: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Try all candidates; the list comes back best first, unfinished ones last.

    Each candidate is measured on the first part of the images. In the order of these values the candidates then get
    all images, but those that lie more than `margin` (relative) above the best first part are given up. Blocks are
    kept, so the first part is not drawn twice, and a killed sweep goes on where it stopped.

    Args:
        source: makes an image source from a plan.
        base: the plan to vary.
        protocol: how to measure, with its n.
        reference: what to measure against.
        tried: the candidates.
        settings: speed and place.
        metric: to order by; default: the protocol's first.
        first_part: share of the images that decides who is given up; 1 = no early stopping.
        margin: relative to the best.
        report: called after each measurement.
    """
    name = metric or protocol.metrics[0]
    if name not in protocol.metrics:
        raise UserError(f"the protocol {protocol.name} does not measure {name!r}: it has {', '.join(protocol.metrics)}")
    sign = -1 if metric_of(name).kind in HIGHER_IS_BETTER else 1
    run = _runner(source, base, protocol, reference, settings)
    part = min(protocol.n, max(1, int(protocol.n * first_part)))
    first = [_trial(run, c, part, name, part == protocol.n, report) for c in tried]
    if part == protocol.n:
        return sorted(first, key=lambda t: sign * t.value)
    best = min(sign * t.value for t in first)
    kept = [t for t in first if sign * t.value <= best + margin * abs(best)]
    done = [_trial(run, t.candidate, protocol.n, name, True, report) for t in kept]
    given_up = [t for t in first if t not in kept]
    return [*sorted(done, key=lambda t: sign * t.value), *sorted(given_up, key=lambda t: sign * t.value)]


def _trial(
    run: Run, candidate: Candidate, n: int, metric: str, finished: bool, report: Callable[[Trial], None] | None
) -> Trial:
    result = run(candidate, n)
    values = {name: value.value for name, value in result.values.items()}
    trial = Trial(candidate, cast(SamplePlan, result.plan), values[metric], n, finished, values)
    if report is not None:
        report(trial)
    return trial


# -- what is written


def table(trials: Sequence[Trial]) -> str:
    """The trials as text, best first."""
    names = list(trials[0].values)
    rows = [["guidance", "images", *names]]
    for t in trials:
        state = str(t.n) + ("" if t.finished else " (given up)")
        rows.append([str(t.candidate), state, *(f"{t.values[name]:.5g}" for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def plot(trials: Sequence[Trial], metric: str, path: str | os.PathLike[str]) -> Path:
    """A picture of the metric over the scale, a line per interval; hollow marks were given up.

    Raises:
        MissingExtraError: without matplotlib.
    """
    from diffzoo.errors import MissingExtraError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval", "the plot of a sweep") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Trial]] = {}
    for t in trials:
        average = f", {t.candidate.weights}" if t.candidate.average else ""
        lines.setdefault(t.candidate.where + average, []).append(t)
    for label, line in lines.items():
        line.sort(key=lambda t: t.candidate.scale)
        finished = [t for t in line if t.finished]
        drawn = axes.plot([t.candidate.scale for t in finished], [t.value for t in finished], "o-", label=label)
        given_up = [t for t in line if not t.finished]
        colour = drawn[0].get_color()
        axes.plot([t.candidate.scale for t in given_up], [t.value for t in given_up], "o", mfc="none", mec=colour)
    axes.set(xlabel="guidance scale", ylabel=metric)
    if not all(t.finished for t in trials):
        axes.set_title("hollow: given up, from fewer images", fontsize="small")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return Path(path)


def write_plan(plan: SamplePlan, path: str | os.PathLike[str]) -> Path:
    """The chosen plan as JSON, as `diffzoo eval --plan` reads it."""
    return write_text(path, json.dumps(plan.to_dict(), indent=2) + "\n")
