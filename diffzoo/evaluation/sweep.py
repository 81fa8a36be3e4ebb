"""Search guidance scale and interval with common random numbers.

All candidates sample the same images from the same seeds, so that their differences are differences of guidance and not
of luck. A candidate whose value after a part of the images lies clearly above the best is given up.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, cast

from diffzoo.errors import UserError
from diffzoo.evaluation.checks import check_count
from diffzoo.evaluation.image_files import FolderImages
from diffzoo.evaluation.measure import metric_of
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.evaluation.reference import Reference
from diffzoo.evaluation.run import RunOptions, evaluate, load_networks
from diffzoo.files import atomic_path, write_text
from diffzoo.generation.generator import ImageSource
from diffzoo.generation.guidance import ByClassifier, no_guidance
from diffzoo.generation.plan import SamplePlan
from diffzoo.record import digest
from diffzoo.sampling import Guidance, Interval

__all__ = [
    "KEEP",
    "Candidate",
    "Trial",
    "candidates",
    "parse_interval",
    "plot",
    "sweep_guidance",
    "table",
    "write_plan",
]

KEEP: Literal["keep"] = "keep"
Where = tuple[float, float] | Literal["keep"] | None
HIGHER_IS_BETTER = ("inception-score", "precision", "recall", "density", "coverage", "clip-score", "authpct", "vendi")


def parse_interval(text: str) -> tuple[float, float] | None:
    """ "0.2-0.8" as a pair; "all" as None."""
    if text == "all":
        return None
    try:
        low, high = (float(part) for part in text.split("-"))
    except ValueError as error:
        raise UserError(f"expected an interval such as 0.2-0.8, or all, got {text!r}") from error
    if not 0 <= low < high <= 1:
        raise UserError(f"an interval lies in t between 0 and 1, low before high; got {text!r}")
    return low, high


@dataclass(frozen=True)
class Candidate:
    """One point of the sweep.

    Args:
        scale: of guidance.
        interval: where it acts, in t; None = everywhere; "keep" = as the base plan has it.
        weights: label of an EMA, or the file of a reconstructed one; None = those of the base plan.
    """

    scale: float
    interval: Where = None
    weights: str | None = None

    def plan(self, base: SamplePlan) -> SamplePlan:
        """The base plan with this guidance and these weights."""
        if self.weights is not None:
            model, label = (self.weights, "ema") if self._is_file else (base.model, self.weights)
            base = replace(base, model=model, weights=label, weights_sha256=None)
        if self.scale == no_guidance(base.guidance):
            return replace(base, guidance=None)
        guidance = replace(base.guidance or Guidance(1.0), scale=self.scale)
        if isinstance(guidance, ByClassifier):
            if self.interval not in (None, KEEP):
                raise UserError("a classifier guides at all times: leave the intervals out of this sweep")
        elif self.interval != KEEP:
            guidance = replace(guidance, interval=None if self.interval is None else Interval(*self.interval))
        return replace(base, guidance=guidance)

    @property
    def which(self) -> str:
        """The weights in words."""
        return Path(self.weights).stem if self.weights and self._is_file else self.weights or "as planned"

    @property
    def _is_file(self) -> bool:
        return (self.weights or "").endswith(".safetensors")

    @property
    def where(self) -> str:
        """The interval in words."""
        if self.interval is None:
            return "everywhere"
        return "where the plan says" if self.interval == KEEP else "t in [{:g}, {:g}]".format(*self.interval)

    def __str__(self) -> str:
        return f"scale {self.scale:g}, {self.where}" + (f", {self.which}" if self.weights else "")


@dataclass(frozen=True)
class Trial:
    """A candidate and what came of it.

    Args:
        candidate: what was tried.
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
    intervals: Sequence[Where] = (None,),
    weights: Sequence[str | None] = (None,),
    none: float = 1.0,
) -> list[Candidate]:
    """All combinations; the scale `none`, no guidance, has no interval."""
    if not scales:
        raise UserError("a sweep needs at least one guidance scale, for example --scales 1 1.5 2")
    found = dict.fromkeys(Candidate(s, None if s == none else i, w) for w, s, i in product(weights, scales, intervals))
    return list(found)


def sweep_guidance(
    source: Callable[[SamplePlan], ImageSource],
    base: SamplePlan,
    protocol: EvalProtocol,
    reference: Reference | FolderImages,
    tried: Sequence[Candidate],
    options: RunOptions,
    *,
    metric: str | None = None,
    first_part: float = 0.2,
    margin: float = 0.1,
    report: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Try all candidates; the list comes back best first, unfinished ones last.

    Each candidate is measured on the first part of the images. In the order of these values the candidates then get
    all images, but those that lie more than `margin` (relative) above the best first part are given up. Blocks are
    kept, so the first part is not sampled twice, and a killed sweep goes on where it stopped.

    Args:
        source: makes an image source from a plan.
        base: the plan to vary.
        protocol: how to measure, with its n.
        reference: what to measure against.
        tried: the candidates.
        options: speed and place.
        metric: to order by; default: the protocol's first.
        first_part: share of the images that decides who is given up; 1 = no early stopping.
        margin: relative to the best.
        report: called after each measurement.
    """
    name, total = metric or protocol.metrics[0], protocol.n
    if name not in protocol.metrics:
        raise UserError(f"the protocol {protocol.name} does not measure {name!r}: it has {', '.join(protocol.metrics)}")
    sign = -1 if metric_of(name).kind in HIGHER_IS_BETTER else 1

    def trial(candidate: Candidate, n: int) -> Trial:
        plan = candidate.plan(base)
        # a first part serves to rank: it may be too small for a value that is worth printing
        mine = replace(options, out=Path(options.out) / "candidates" / digest(plan)[:12], few=options.few or n < total)
        result = evaluate(source(plan), replace(protocol, n=n), reference, mine)
        values = {name: value.value for name, value in result.values.items()}
        made = Trial(candidate, cast(SamplePlan, result.plan), values[name], n, n == total, values)
        if report is not None:
            report(made)
        return made

    networks = load_networks(protocol.metrics, options.weights, options.device)
    check_count(protocol, networks, options.few)  # of all images, before the first part is sampled
    part = min(total, max(1, int(total * first_part)))
    first = [trial(candidate, part) for candidate in tried]
    if part == total:
        return sorted(first, key=lambda t: sign * t.value)
    best = min(sign * t.value for t in first)
    kept = [t for t in first if sign * t.value <= best + margin * abs(best)]
    done = [trial(t.candidate, total) for t in kept]
    given_up = [t for t in first if t not in kept]
    return [*sorted(done, key=lambda t: sign * t.value), *sorted(given_up, key=lambda t: sign * t.value)]


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
    """A plot of the metric over the scale, a line per interval; hollow marks were given up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Trial]] = {}
    for t in trials:
        weights = f", {t.candidate.which}" if t.candidate.weights else ""
        lines.setdefault(t.candidate.where + weights, []).append(t)
    for label, line in lines.items():
        line.sort(key=lambda t: t.candidate.scale)
        finished = [t for t in line if t.finished]
        line_ = axes.plot([t.candidate.scale for t in finished], [t.value for t in finished], "o-", label=label)
        given_up = [t for t in line if not t.finished]
        colour = line_[0].get_color()
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
