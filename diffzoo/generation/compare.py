"""Ways to sample side by side: the same classes and seeds, a column for each way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TypeVar, Unpack

import numpy as np

from diffzoo.errors import UserError
from diffzoo.generation.pipeline import Pipeline, pipeline
from diffzoo.generation.published import Speed
from diffzoo.generation.samples import Samples

__all__ = ["Way", "compare", "every_way"]


@dataclass(frozen=True)
class Way:
    """How a column is sampled; None = as published.

    Args:
        source: what `pipeline` takes.
        weights: of a checkpoint: "ema", "raw" or the label of an EMA.
        sampler: name of its class.
        steps: of the sampler.
        guidance: strength.
    """

    source: str
    weights: str = "ema"
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None


def every_way(
    sources: Sequence[str],
    weights: Sequence[str] = ("ema",),
    samplers: Sequence[str | None] = (None,),
    steps: Sequence[int | None] = (None,),
    guidances: Sequence[float | None] = (None,),
) -> list[Way]:
    """All combinations, the last varying fastest."""
    return [Way(*values) for values in product(sources, weights, samplers, steps, guidances)]


def compare(
    ways: Sequence[Way],
    classes: Sequence[str | int] | None,
    seeds: Sequence[int],
    device: str | None = None,
    **options: Unpack[Speed],
) -> Samples:
    """Sample every class and seed in every way: a row for each class and seed, a column for each way.

    Args:
        ways: with the sources next to each other, so that each is loaded once.
        classes: names, numbers or captions; None = the first class, where there are any.
        seeds: one image per class, seed and way.
        device: where to compute; default: a GPU if there is one.
        options: as for sampling.

    Raises:
        UserError: for models whose images differ in size, and for whatever one of them cannot sample.
    """
    made: list[Samples] = []
    loaded: tuple[Way, Pipeline] | None = None
    for way in ways:
        key = replace(way, sampler=None, steps=None, guidance=None)
        if loaded is None or loaded[0] != key:
            loaded = key, pipeline(way.source, device, weights=way.weights)
        if classes is None and loaded[1].classes.count:
            classes = [0]
        made.append(loaded[1](classes, seeds, guidance=way.guidance, steps=way.steps, sampler=way.sampler, **options))
    sizes = {samples.pixels.shape[1:] for samples in made}
    if len(sizes) != 1:
        raise UserError(f"the images differ in size: {', '.join(f'{h} x {w}' for h, w, _ in sorted(sizes))}")
    pixels = np.stack([samples.pixels for samples in made], axis=1).reshape(-1, *sizes.pop())
    labels = _in_rows(samples.labels for samples in made)
    records = _in_rows(samples.records for samples in made)
    return Samples(pixels, labels, records, len(ways), _heads(ways))


T = TypeVar("T")


def _in_rows(columns: Iterable[Sequence[T]]) -> list[T]:
    return [item for row in zip(*columns, strict=True) for item in row]


def _heads(ways: Sequence[Way]) -> list[str]:
    """What tells the columns apart."""
    varied = [f.name for f in fields(Way) if len({getattr(way, f.name) for way in ways}) > 1]

    def word(way: Way, name: str) -> str:
        value = getattr(way, name)
        if name == "source":
            return str(value).rstrip("/").rsplit("/", 1)[-1]
        return str(value) if name == "sampler" and value else f"{name} {'published' if value is None else value}"

    return [", ".join(word(way, name) for name in varied) for way in ways]
