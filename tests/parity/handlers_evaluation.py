"""The arithmetic of the ADM evaluator: recorded from its official NumPy and SciPy code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import Handler, Json, Tensors, deviation
from torch import Tensor

from diffzoo.metrics.frechet import FrechetReference
from diffzoo.metrics.inception import spatial_layer
from diffzoo.metrics.inception_score import inception_score
from diffzoo.metrics.moments import Moments
from diffzoo.metrics.neighbours import precision_recall, squared_radii
from diffzoo.metrics.resize import resize_tf1


def _is_evaluator(case: Json) -> bool:
    return "evaluator" in str(case.get("model", "")).lower() and "fid" in case.get("values", {})


def _fid(sample: Tensor, reference: Tensor) -> float:
    y = Moments.of(reference)
    return FrechetReference.of(y.mean, y.covariance()).distance_of(Moments.of(sample))


def _frechet(values: dict[str, Any], limits: dict[str, Any], t: Tensors) -> None:
    sample, reference = t["in/features_sample"], t["in/features_ref"]
    assert _fid(sample, reference) == pytest.approx(values["fid"], rel=limits["fid"])
    assert _fid(sample, reference) == pytest.approx(values["fid_independent_eigen_float64"], rel=1e-7)
    # fewer rows than dimensions: the covariances are singular
    singular = _fid(sample[:32], reference[:32])
    assert singular == pytest.approx(values["fid_first_32_rows_sqrtm"], rel=1e-3)
    assert singular == pytest.approx(values["fid_first_32_rows_eigen_float64"], rel=1e-6)
    assert _fid(reference, reference) == pytest.approx(0, abs=1e-4)


def _statistics(limits: dict[str, Any], t: Tensors) -> None:
    for side in ("ref", "sample"):
        moments = Moments.of(t[f"in/features_{side}"])
        assert deviation(moments.mean, t[f"out/mu_{side}"]) <= limits["statistics"]
        assert deviation(moments.covariance(), t[f"out/sigma_{side}"]) <= limits["statistics"]


def _spatial(values: dict[str, Any], limits: dict[str, Any], t: Tensors) -> None:
    sides = {}
    for side in ("ref", "sample"):
        nchw = t[f"in/spatial_{side}_nhwc"].permute(0, 3, 1, 2)
        sides[side] = spatial_layer(nchw)
    assert torch.equal(sides["sample"][0], t["out/spatial_sample_flat_first_row"])
    assert deviation(Moments.of(sides["ref"]).mean, t["out/mu_s_ref"]) <= limits["statistics"]
    assert _fid(sides["sample"], sides["ref"]) == pytest.approx(values["sfid"], rel=limits["sfid"])


def _scores(values: dict[str, Any], limits: dict[str, Any], t: Tensors) -> None:
    logits = t["in/features_sample"] @ t["in/softmax_weight"]
    for size in (5000, 200, 150):
        want = values[f"inception_score_split{size}"]
        assert inception_score(logits, size)[0] == pytest.approx(want, rel=limits["inception_score"])


def _neighbours(values: dict[str, Any], limits: dict[str, Any], t: Tensors) -> None:
    sample, reference = t["in/features_sample"], t["in/features_ref"]
    assert deviation(squared_radii(reference.double()), t["out/radii_ref_squared"]) <= limits["radii"]
    assert deviation(squared_radii(sample.double()), t["out/radii_sample_squared"]) <= limits["radii"]
    inside = precision_recall(sample, reference)
    assert torch.equal(inside.sample_inside, t["out/sample_in_ref_manifold"].bool())
    assert torch.equal(inside.reference_inside, t["out/ref_in_sample_manifold"].bool())
    assert (inside.precision, inside.recall) == pytest.approx((values["precision"], values["recall"]), abs=1e-12)
    for k in (1, 5):
        found = precision_recall(sample, reference, k)
        want = (values[f"precision_k{k}"], values[f"recall_k{k}"])
        assert (found.precision, found.recall) == pytest.approx(want, abs=1e-12)
    swapped = precision_recall(reference, sample)
    assert [swapped.precision, swapped.recall] == pytest.approx(values["swapped_arguments"], abs=1e-12)


def _resize(limits: dict[str, Any], t: Tensors) -> None:
    for name in ("up", "down", "same"):
        want = t[f"out/resize_{name}_float_nhwc"]
        got = resize_tf1(t[f"in/resize_{name}_uint8_nhwc"].permute(0, 3, 1, 2).float(), want.shape[1])
        assert float((got.permute(0, 2, 3, 1) - want).abs().max()) <= limits["resize_abs"]


def _run(case: Json, tensors: Tensors, folder: Path) -> None:
    values, limits = case["values"], case["tolerance"]
    _frechet(values, limits, tensors)
    _statistics(limits, tensors)
    _spatial(values, limits, tensors)
    _scores(values, limits, tensors)
    _neighbours(values, limits, tensors)
    _resize(limits, tensors)


HANDLERS: list[Handler] = [(_is_evaluator, _run)]
