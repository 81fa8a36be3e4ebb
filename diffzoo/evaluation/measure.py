"""From features to values with uncertainty.

A metric is named `kind:network`, for example "frechet:random-conv"; the names that papers use are short for one of
these ("fid" for "frechet:inception-2015"). Values carry a standard error where one can be had, and in words what it is:

    leave-one-group-out jackknife over groups of consecutive seeds (Fréchet distances, a one-split Inception Score,
    precision, density, AuthPct, CLIPScore), binomial over reference images (recall, coverage), over splits
    (Inception Score), over groups of consecutive seeds (KID, CMMD), none (Vendi score)

A Fréchet ratio is a Fréchet distance divided by that of real images that were held out, so 1 is as near as real images
come in that network; the mean over several networks is FDr^k of arXiv:2604.28190, here "fdr6" and so on.

All are errors of sampling the generated images. None covers the choice of reference images or the bias of a finite n,
which is the same for all results of one protocol and one reason why protocols must be equal to be compared.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.evaluation.reference import Reference
from diffzoo.metrics.clip_score import clip_scores
from diffzoo.metrics.features import FEATURE_NETWORKS, FeatureNetwork, extract
from diffzoo.metrics.frechet import FrechetReference, frechet_ratio
from diffzoo.metrics.inception_score import inception_score, score_of_sums, score_sums
from diffzoo.metrics.kernels import cmmd, cmmd_parts, kid_parts, kid_subsets
from diffzoo.metrics.moments import Moments, merge_all
from diffzoo.metrics.neighbours import authentic, density_coverage, precision_recall
from diffzoo.metrics.vendi import vendi_score

__all__ = [
    "ALIASES",
    "HELD_OUT",
    "Features",
    "Metric",
    "Value",
    "held_out_distances",
    "jackknife",
    "measure",
    "metric_of",
    "neighbours_of",
]

GROUPS, PIECE = 10, 500
HELD_OUT = "held_out_distance"  # setting of protocols: network to the Fréchet distance of held-out real images
INCEPTION, DINO, CLIP, CLIP_336 = "inception-2015", "dinov2-vitl14", "clip-vitl14", "clip-vitl14-336"

# kind: the layer it reads
KINDS = {
    "frechet": "pool",
    "frechet-ratio": "pool",
    "frechet-spatial": "spatial",
    "inception-score": "logits",
    "precision": "pool",
    "recall": "pool",
    "density": "pool",
    "coverage": "pool",
    "kid": "pool",
    "authpct": "pool",
    "vendi": "pool",
    "clip-score": "image",
    "cmmd": "image",
}
ALIASES = {
    "fid": f"frechet:{INCEPTION}",
    "sfid": f"frechet-spatial:{INCEPTION}",
    "is": f"inception-score:{INCEPTION}",
    "precision": f"precision:{INCEPTION}",
    "recall": f"recall:{INCEPTION}",
    "density": f"density:{INCEPTION}",
    "coverage": f"coverage:{INCEPTION}",
    "kid": f"kid:{INCEPTION}",
    "fdd": f"frechet:{DINO}",
    "precision_dinov2": f"precision:{DINO}",
    "recall_dinov2": f"recall:{DINO}",
    "authpct": f"authpct:{DINO}",
    "vendi": f"vendi:{DINO}",
    "clip_score": f"clip-score:{CLIP}",
    "cmmd": f"cmmd:{CLIP_336}",
}


class Pixels(Protocol):
    """Raw pixels by position."""

    def __len__(self) -> int: ...

    def images(self, start: int, count: int) -> Tensor:
        """uint8 `(count, 3, h, w)`."""


class Metric(NamedTuple):
    """A metric's kind, its feature network and the layer it reads."""

    kind: str
    network: str
    layer: str


class Value(NamedTuple):
    """A value, its standard error or None, and what that error is."""

    value: float
    standard_error: float | None
    method: str | None

    def to_dict(self) -> dict[str, object]:
        """As JSON-ready data."""
        return self._asdict()


def metric_of(name: str) -> Metric:
    """The metric of a name; an unknown one raises and names the nearest."""
    kind, _, network = ALIASES.get(name, name).partition(":")
    if kind not in KINDS or not network:
        raise UserError(f"unknown metric {name!r}{did_you_mean(name, [*ALIASES, *(f'{k}:NETWORK' for k in KINDS)])}")
    if network not in FEATURE_NETWORKS:
        raise UserError(f"metric {name!r}: unknown feature network{did_you_mean(network, FEATURE_NETWORKS)}")
    layer = "image" if KINDS[kind] == "pool" and network in (CLIP, CLIP_336) else KINDS[kind]  # all that they have
    return Metric(kind, network, layer)


@dataclass
class Features:
    """Features of the generated images in the order of their seeds: (network, layer) to `(n, d)`.

    Args:
        layers: the features.
        captions: CLIP embeddings of the captions by network, for CLIPScore.
    """

    layers: Mapping[tuple[str, str], Tensor]
    captions: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, metric: Metric) -> Tensor:
        """The features a metric reads."""
        return self.layers[metric.network, metric.layer]


# -- uncertainty


def _bounds(n: int, groups: int) -> list[tuple[int, int]]:
    """`groups` consecutive parts of 0..n of nearly equal size, whatever the blocks on disk."""
    return [(g * n // groups, (g + 1) * n // groups) for g in range(groups)]


def jackknife(left_out: Sequence[float]) -> float:
    """Standard error from the values with one group left out each (Efron & Tibshirani 1993, Eq. 11.5)."""
    g = len(left_out)
    mean = sum(left_out) / g
    return math.sqrt((g - 1) / g * sum((v - mean) ** 2 for v in left_out))


def _of_mean(values: Tensor, groups: int) -> float | None:
    """Jackknife error of a mean over images."""
    n, total = len(values), float(values.double().sum())
    if groups < 2 or n < 2 * groups:
        return None
    rest = [(total - float(values[a:b].double().sum())) / (n - (b - a)) for a, b in _bounds(n, groups)]
    return jackknife(rest)


def _jackknife_text(groups: int) -> str:
    return f"leave-one-group-out jackknife over {groups} groups of consecutive seeds"


def _mean_value(per_image: Tensor, groups: int) -> Value:
    error = _of_mean(per_image, groups)
    return Value(float(per_image.double().mean()), error, _jackknife_text(groups) if error is not None else None)


def _over_groups(
    x: Tensor, y: Tensor, parts: Callable[[Sequence[Tensor], Tensor], Sequence[float]], groups: int
) -> tuple[float | None, str | None]:
    """Standard error of a mean over groups of consecutive seeds, and what it is."""
    if groups < 2 or len(x) < 2 * groups:
        return None, None
    values = torch.tensor(parts([x[a:b] for a, b in _bounds(len(x), groups)], y), dtype=torch.float64)
    return float(values.std()) / math.sqrt(groups), f"over {groups} groups of consecutive seeds"


# -- metrics


def _without_each(parts: Sequence[Moments]) -> Iterable[Moments]:
    """The moments without each part in turn, from running merges of both sides: 2g merges instead of g^2."""
    below: list[Moments | None] = [None]
    for part in parts[:-1]:
        below.append(part if below[-1] is None else below[-1].merge(part))
    above: list[Moments | None] = [None]
    for part in reversed(parts[1:]):
        above.append(part if above[-1] is None else part.merge(above[-1]))
    for left, right in zip(below, reversed(above), strict=True):
        present = [m for m in (left, right) if m is not None]
        yield merge_all(present)


def _frechet(x: Tensor, reference: FrechetReference, groups: int) -> Value:
    n = len(x)
    # the mean and scatter are summed in pieces, so that float64 copies of all features never exist at once
    many = groups if groups >= 2 and n >= 2 * groups else 1
    parts = [merge_all(Moments.of(p) for p in x[a:b].split(5000)) for a, b in _bounds(n, many)]
    whole = merge_all(parts)
    value = reference.distance_of(whole)
    # leaving out a group of a set that barely spans the space says nothing about its distance
    if many == 1 or n - -(-n // many) <= x.shape[1]:
        return Value(value, None, None)
    return Value(value, jackknife(reference.changes(whole, _without_each(parts))), _jackknife_text(many))


def _ratio(distance: Value, of_held_out: float) -> Value:
    error = distance.standard_error
    return Value(
        frechet_ratio([distance.value], [of_held_out]), None if error is None else error / of_held_out, distance.method
    )


def held_out_distances(
    images: Pixels, metrics: Sequence[str], reference: Reference, networks: Mapping[str, FeatureNetwork]
) -> dict[str, float]:
    """Fréchet distance of real images that were held out to the reference, by network: what ratios are relative to.

    Args:
        images: the held-out ones; all are used, and their number enters the bias.
        metrics: of a protocol; those of kind "frechet-ratio" count.
        reference: as for the generated images.
        networks: by name.
    """
    found = {}
    for metric in {metric_of(name) for name in metrics if metric_of(name).kind == "frechet-ratio"}:
        network = networks[metric.network]
        parts = (extract(network, images.images(i, PIECE))[metric.layer] for i in range(0, len(images), PIECE))
        statistics = FrechetReference.of(*reference.statistics(network, metric.layer))
        found[network.name] = statistics.distance_of(merge_all(Moments.of(part) for part in parts))
    return found


def _inception(logits: Tensor, split_size: int, groups: int) -> Value:
    score, splits = inception_score(logits, split_size)
    if len(splits) > 1:
        spread = torch.tensor(splits, dtype=torch.float64).std()
        return Value(score, float(spread) / math.sqrt(len(splits)), f"over {len(splits)} splits of {split_size}")
    if groups < 2 or len(logits) < 2 * groups:
        return Value(score, None, None)
    sums = torch.stack([score_sums(logits[a:b]) for a, b in _bounds(len(logits), groups)])
    rest = [score_of_sums(sums.sum(dim=0) - part) for part in sums]
    return Value(score, jackknife(rest), _jackknife_text(groups))


@dataclass
class _Measurement:
    """The values of one protocol; neighbours that two metrics share are looked for once."""

    protocol: EvalProtocol
    features: Features
    reference: Reference
    networks: Mapping[str, FeatureNetwork]
    groups: int
    device: torch.device | str
    shared: dict[tuple[str, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def _setting(self, name: str, default: int) -> int:
        return int(self.protocol.settings.get(name, default))

    def _both(self, metric: Metric) -> tuple[Tensor, Tensor]:
        network = self.networks[metric.network]
        reference = self.reference.features(network, metric.layer)
        return self.features.of(metric).to(self.device), reference.to(self.device)

    def _neighbours(self, metric: Metric, manifold: bool) -> tuple[Tensor, Tensor]:
        key = (metric.network, manifold)
        if key not in self.shared:
            compute = precision_recall if manifold else density_coverage
            self.shared[key] = compute(*self._both(metric), neighbours_of(self.protocol, metric.kind))
        return self.shared[key]

    def value(self, name: str) -> Value:
        """The value of one metric."""
        metric = metric_of(name)
        kind = metric.kind
        if kind.startswith("frechet"):
            network = self.networks[metric.network]
            statistics = FrechetReference.of(*self.reference.statistics(network, metric.layer))
            found = _frechet(self.features.of(metric), statistics, self.groups)
            return _ratio(found, self.protocol.settings[HELD_OUT][network.name]) if kind == "frechet-ratio" else found
        if kind == "inception-score":
            return _inception(self.features.of(metric), self._setting("is_split", 5000), self.groups)
        if kind in ("precision", "density"):
            return _mean_value(self._neighbours(metric, kind == "precision")[0].cpu(), self.groups)
        if kind in ("recall", "coverage"):
            inside = self._neighbours(metric, kind == "recall")[1]
            share, n = float(inside.double().mean()), len(inside)
            return Value(share, math.sqrt(share * (1 - share) / n), f"binomial over {n} reference images")
        if kind == "clip-score":
            return _mean_value(
                clip_scores(self.features.of(metric), self.features.captions[metric.network]), self.groups
            )
        if kind == "vendi":
            return Value(vendi_score(self.features.of(metric)), None, None)
        x, y = self._both(metric)
        if kind == "authpct":
            return _mean_value(100 * authentic(x, y).double().cpu(), self.groups)
        if kind == "cmmd":
            return Value(cmmd(x, y), *_over_groups(x, y, cmmd_parts, self.groups))
        size = min(self._setting("kid_subset_size", 1000), len(x), len(y))
        mean, _ = kid_subsets(x, y, self._setting("kid_subsets", 100), size)
        # the spread over subsets of the same images is no error of the mean: it says nothing of how many there are
        return Value(mean, *_over_groups(x, y, kid_parts, self.groups))


def neighbours_of(protocol: EvalProtocol, kind: str) -> int:
    """k of a neighbour metric of a protocol."""
    of_manifold = kind in ("precision", "recall")
    name, default = ("precision_recall_k", 3) if of_manifold else ("density_coverage_k", 5)
    return int(protocol.settings.get(name, default))


def measure(
    protocol: EvalProtocol,
    features: Features,
    reference: Reference,
    networks: Mapping[str, FeatureNetwork],
    *,
    groups: int = GROUPS,
    device: torch.device | str = "cpu",
) -> dict[str, Value]:
    """The values of all metrics of a protocol.

    Args:
        protocol: which metrics, with which settings.
        features: of the images, in the order of their seeds.
        reference: what they are measured against.
        networks: the feature networks by name.
        groups: groups of consecutive seeds for standard errors; 0 = none.
        device: where neighbours and kernels are computed.
    """
    measurement = _Measurement(protocol, features, reference, networks, groups, device)
    values = {name: measurement.value(name) for name in protocol.metrics}
    ratios = [values[name].value for name in values if metric_of(name).kind == "frechet-ratio"]
    if len(ratios) > 1:
        values[f"fdr{len(ratios)}"] = Value(sum(ratios) / len(ratios), None, None)
    return values
