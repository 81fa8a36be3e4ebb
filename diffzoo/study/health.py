"""The health of a run: its loss per noise level beside that of earlier runs of the same recipe.

A reference curve holds, for each noise level and each window of images, the interval in which a further run of the same
recipe lies with 95 %: Student's prediction interval of the logarithm, mean ± t s sqrt(1 + 1/n) over n runs. A study
writes one for every arm with enough seeds; those that ship lie in `reference/`. A noise level is out of its band if the
last two windows of the run are, on the same side: one in twenty windows lies outside by chance.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import write_text
from diffzoo.record import from_plain, to_plain
from diffzoo.report import NOISE_LEVEL, RunRecord, read_run

__all__ = ["Curve", "Health", "check_run", "curve_of", "curves", "find_curve", "note", "read_curve", "write_curve"]

SHIPPED = Path(__file__).parent / "reference"
FEWEST = 3  # runs that make a curve: two leave an interval of 12.7 standard deviations
WINDOWS = 8  # each √2 times as long as the one before
# the settings that the loss depends on; seeds, speed, previews and evaluation are not among them
_MODEL = "network weights process weighting time_density loss_ condition_dropout freeze lora optimizer lr_scheduler"
_DATA = "image_size batch_size balance path source flip crop caption"
MATTERS = (
    *(f"model.{k}" for k in (*_MODEL.split(), "text_encoder", "autoencoder")),
    *("data.class_path", *(f"data.init_args.{k}" for k in _DATA.split())),
)
LOSS = ("model.process", "model.weighting", "model.loss_")  # settings under which a loss is another quantity
HIGH_NOISE, LOW_NOISE = -2.0, 2.0  # log-SNR
MEANINGS = {
    "all above": "Every noise level is above: the learning rate, the batch size, the precision or the data are "
    "probably not those of the reference.",
    "high noise above": "High noise is above: there the network sees little but its condition. Look at the classes or "
    "captions, at condition_dropout, and at whether the data is more varied than that of the reference.",
    "middle above": "The middle is above: shapes are learned there. Look at the size of the network, at dropout, and "
    "at whether the noise schedule fits the image size.",
    "low noise above": "Low noise is above: there the network has to copy its input exactly. Look at the precision, at "
    "a learning rate that is too high, and at images that are noisy or scaled other than to [-1, 1].",
    "below": "A loss below the band is not better by itself: the data may be easier or contain repeated images. Look "
    "at the held-out loss.",
}


@dataclass(frozen=True)
class Band:
    """Where a further run lies with 95 %, for one noise level: `low` and `high` for each window."""

    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """The losses of several runs of one recipe.

    Args:
        name: of the recipe or of the study and its arm.
        runs: how many.
        edges: of the windows, in images seen; one more than there are windows.
        bands: by noise level, named as in metrics.csv: "-2_0" is log-SNR from -2 to 0.
        settings: of the recipe, those that matter, by dotted key.
    """

    name: str
    runs: int
    edges: tuple[float, ...]
    bands: Mapping[str, Band]
    settings: Mapping[str, str]

    def differences(self, recipe: Mapping[str, str]) -> list[str]:
        """The dotted keys in which a recipe differs, of those that matter."""
        given = _relevant(recipe)
        return sorted(k for k in {*given, *self.settings} if given.get(k) != self.settings.get(k))


@dataclass(frozen=True)
class Level:
    """A noise level of a run in the last window that it has finished.

    Args:
        name: as in metrics.csv.
        value: its loss there.
        low, high: the band there.
        side: where it lies, in this window and the one before.
        since: images seen from which on it has been out; 0 if it is not.
    """

    name: str
    value: float
    low: float
    high: float
    side: Literal["in", "above", "below"]
    since: int = 0

    def __str__(self) -> str:
        where = f"{self.side} the band since {self.since:,} images" if self.since else "in the band"
        return f"{_words(self.name)}: {where} (loss {self.value:.4g}, band {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Health:
    """A run beside a curve: `images` seen as far as it is judged, its noise levels, settings that differ."""

    curve: Curve
    images: int
    levels: tuple[Level, ...]
    differences: tuple[str, ...] = ()

    @property
    def out(self) -> list[Level]:
        """The noise levels that are out of their band."""
        return [level for level in self.levels if level.since]

    def __str__(self) -> str:
        count = f"{len(self.levels) - len(self.out)} of {len(self.levels)} noise levels in the band"
        lines = [f"{count} of {self.curve.name} ({self.curve.runs} runs) at {self.images:,} images"]
        if self.differences:
            lines.append(f"the recipe differs in {', '.join(self.differences)}")
        return "\n".join([*lines, *map(str, self.out), *(MEANINGS[key] for key in _meanings(self))])


# -- curves


def curve_of(name: str, runs: Sequence[Path]) -> Curve:
    """The curve of finished runs of one recipe with different seeds.

    Raises:
        UserError: for fewer than three runs, runs of different settings, or runs without losses per noise level.
    """
    if len(runs) < FEWEST:
        raise UserError(f"a reference curve needs at least {FEWEST} runs with different seeds, got {len(runs)}")
    records = [read_run(run) for run in runs]
    settings = _relevant(records[0].recipe)
    for record in records[1:]:
        if differ := [k for k, v in _relevant(record.recipe).items() if settings.get(k) != v]:
            raise UserError(f"{record.folder} differs from {records[0].folder} in {', '.join(differ)}")
    end = min(_seen(record)[-1][1] for record in records)
    edges = tuple(end * 2 ** ((k - WINDOWS) / 2) for k in range(WINDOWS + 1))
    bands = dict[str, Band]()
    for level in _levels(records[0]):
        columns = list(zip(*(_windows(record, level, edges) for record in records), strict=True))
        if all(value is not None and value > 0 for column in columns for value in column):
            intervals = [prediction_interval([math.log(v) for v in column if v]) for column in columns]
            bands[level] = Band(*(tuple(map(math.exp, bounds)) for bounds in zip(*intervals, strict=True)))
    return Curve(name, len(records), edges, bands, settings)


def prediction_interval(values: Sequence[float], probability: float = 0.95) -> tuple[float, float]:
    """Where one more value of the same normal distribution lies with this probability."""
    from scipy.stats import t

    half = float(t.ppf((1 + probability) / 2, len(values) - 1)) * stdev(values) * math.sqrt(1 + 1 / len(values))
    return mean(values) - half, mean(values) + half


def write_curve(curve: Curve, path: Path) -> None:
    """Write a curve as JSON."""
    write_text(path, json.dumps(to_plain(curve), indent=1) + "\n")


def read_curve(path: Path) -> Curve:
    """A curve from its file.

    Raises:
        UserError: if the file is no curve, naming the field.
    """
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no reference curve: {error}") from error
    return from_plain(Curve, data, str(path))


def curves() -> dict[str, Curve]:
    """The curves that ship, by name."""
    return {curve.name: curve for curve in map(read_curve, sorted(SHIPPED.glob("*.json")))}


def find_curve(name: str) -> Curve:
    """A curve by its file or the name of one that ships.

    Raises:
        UserError: if there is none.
    """
    if Path(name).is_file():
        return read_curve(Path(name))
    known = curves()
    if name not in known:
        raise UserError(f"no reference curve is called {name!r}{did_you_mean(name, known)}")
    return known[name]


# -- runs


def check_run(run: Path, curve: Curve | None = None) -> Health:
    """A run, finished or not, beside a curve; None = the one that ships for its settings.

    Raises:
        UserError: if it is no run, if no curve matches its settings, if the curve is of another loss, or if the run has
            not seen enough images yet.
    """
    record = read_run(run)
    curve = curve or _of_settings(record)
    seen, differences = _seen(record)[-1][1], tuple(curve.differences(record.recipe))
    if other := [key for key in differences if key.startswith(LOSS)]:
        raise UserError(f"the losses of {run} are not those of {curve.name}: it differs in {', '.join(other)}")
    finished = sum(edge <= seen for edge in curve.edges[1:])
    if not finished:
        raise UserError(
            f"{run} has seen {seen:,.0f} images: the first window of {curve.name} ends at {curve.edges[1]:,.0f}"
        )
    levels = [_judged(record, level, curve, finished) for level in curve.bands]
    return Health(curve, round(curve.edges[finished]), tuple(v for v in levels if v is not None), differences)


def note(run: Path) -> str:
    """What to say about a finished run; empty where no curve matches its settings."""
    try:
        return str(check_run(run))
    except UserError:
        return ""


def _of_settings(record: RunRecord) -> Curve:
    known = curves()
    for curve in known.values():
        if not curve.differences(record.recipe):
            return curve
    names = f"one of {', '.join(known)}, or a file" if known else "a file"
    raise UserError(f"{record.folder}: no shipped reference curve matches its settings; --against takes {names}")


def _judged(record: RunRecord, level: str, curve: Curve, finished: int) -> Level | None:
    band, values = curve.bands[level], _windows(record, level, curve.edges[: finished + 1])
    sides = [_side(v, low, high) for v, low, high in zip(values, band.low, band.high, strict=False)]
    value, last = values[-1], finished - 1
    if value is None:
        return None
    first = last
    while first > 0 and sides[first - 1] == sides[last]:
        first -= 1
    out = sides[last] != "in" and (first < last or not math.isfinite(value))
    since = round(curve.edges[first]) if out else 0
    return Level(level, value, band.low[last], band.high[last], sides[last] if out else "in", since)


def _side(value: float | None, low: float, high: float) -> Literal["in", "above", "below"]:
    if value is None or low <= value <= high:
        return "in"
    return "below" if value < low else "above"  # a loss that is not finite is above


def _windows(record: RunRecord, level: str, edges: Sequence[float]) -> list[float | None]:
    """The mean loss of a noise level in each window; None where no row has it."""
    seen, points = dict(_seen(record)), record.columns.get(NOISE_LEVEL + level, ())
    found = list[float | None]()
    for low, high in pairwise(edges):
        inside = [value for step, value in points if low < seen.get(step, -1) <= high]
        found.append(mean(inside) if inside else None)
    return found


def _seen(record: RunRecord) -> Sequence[tuple[int, float]]:
    """Images seen by step."""
    seen = record.columns.get("speed/images_seen")
    if not seen or not _levels(record):
        what = "no losses per noise level in its metrics.csv"
        raise UserError(f"{record.folder} has {what}: is it a run of `diffzoo fit`?")
    return seen


def _levels(record: RunRecord) -> list[str]:
    return [name.removeprefix(NOISE_LEVEL) for name in record.columns if name.startswith(NOISE_LEVEL)]


def _relevant(recipe: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in recipe.items() if k.startswith(MATTERS) and v not in ("null", "{}", "[]")}


# -- in words


def _bounds(level: str) -> tuple[float, float]:
    low, high = level.split("_")
    return -math.inf if low == "min" else float(low), math.inf if high == "max" else float(high)


def _words(level: str) -> str:
    low, high = _bounds(level)
    if math.isinf(high):
        return f"log-SNR above {low:g}"
    return f"log-SNR below {high:g}" if math.isinf(low) else f"log-SNR {low:g} to {high:g}"


def _meanings(health: Health) -> list[str]:
    """Keys of `MEANINGS` that apply."""
    above = [_bounds(level.name) for level in health.out if level.side == "above"]
    found = ["below"] if any(level.side == "below" for level in health.out) else []
    if above and len(above) == len(health.levels):
        return ["all above", *found]
    parts = {
        "high noise above": any(high <= HIGH_NOISE for _, high in above),
        "middle above": any(high > HIGH_NOISE and low < LOW_NOISE for low, high in above),
        "low noise above": any(low >= LOW_NOISE for low, _ in above),
    }
    return [*(key for key, holds in parts.items() if holds), *found]
