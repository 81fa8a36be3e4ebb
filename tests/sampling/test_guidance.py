"""Guidance: both formulas, what it costs, where it acts, and what it does to the law of the images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GaussianOracle, MixtureOracle
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process import Cosine, Estimate, Flow, GaussianProcess, LinearTime, Straight
from diffzoo.sampling import (
    DDIM,
    Autoguidance,
    ClassifierFree,
    DPMSolverMultistep,
    DynamicThresholding,
    Guidance,
    Interval,
    PowerCosine,
    UniformLogSNR,
    sample,
)
from diffzoo.typing import Condition

PROCESS = GaussianProcess(Cosine(-9, 9))
MEANS = torch.tensor([[0.8, -0.3, 0.1, 0.5], [-0.6, 0.2, 0.9, -0.1]])
T = torch.tensor(0.4, dtype=torch.float64)


def oracle() -> MixtureOracle:
    return MixtureOracle(PROCESS, torch.tensor([0.6, 0.4]), MEANS, torch.tensor([0.5, 0.7]))


def batch() -> tuple[Tensor, Condition]:
    z = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return z, Condition(label=torch.tensor([0, 1, 1, 0]))


# -- the two formulas


@given(scale=st.floats(-2, 9))
def test_formulas_written_out(scale: float) -> None:
    z, cond = batch()
    c, u = oracle()(z, T, cond), oracle()(z, T)
    first = ClassifierFree(oracle(), scale)(z, T, cond)
    second = ClassifierFree(oracle(), scale, "cond")(z, T, cond)
    torch.testing.assert_close(first.x, u.x + scale * (c.x - u.x))
    torch.testing.assert_close(first.eps, u.eps + scale * (c.eps - u.eps))
    torch.testing.assert_close(second.x, c.x + scale * (c.x - u.x))
    torch.testing.assert_close(second.eps, c.eps + scale * (c.eps - u.eps))
    # Simple Diffusion writes (1 + eta) cond - eta uncond and quotes 1 + eta
    torch.testing.assert_close(second.eps, (1 + scale) * c.eps - scale * u.eps)


@given(scale=st.floats(0, 9), u=st.floats(0, 1))
def test_guided_estimates_still_explain_z(scale: float, u: float) -> None:
    z, cond = batch()
    t = torch.tensor(u, dtype=torch.float64)
    guided = ClassifierFree(oracle(), scale)(z, t, cond)
    torch.testing.assert_close(PROCESS.add_noise(guided.x, guided.eps, t), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "process", [PROCESS, GaussianProcess(LinearTime(-9, 9), Straight(), Flow())], ids=["v", "flow"]
)
def test_rescaled_guidance(process: GaussianProcess) -> None:
    """Eq. 14-16 of arXiv:2305.08891: at phi = 1 the output has the standard deviation that it has without guidance."""

    def said(estimate: Estimate) -> Tensor:
        return process.target(estimate.x, estimate.eps, T)

    denoise = MixtureOracle(process, torch.tensor([0.6, 0.4]), MEANS, torch.tensor([0.5, 0.7]))
    z, cond = batch()
    plain, guided = said(denoise(z, T, cond)), said(ClassifierFree(denoise, 7.0)(z, T, cond))
    ratio = plain.flatten(1).std(1) / guided.flatten(1).std(1)
    for phi in (0.7, 1.0):
        got = ClassifierFree(denoise, 7.0, rescale=phi)(z, T, cond)
        torch.testing.assert_close(said(got), guided * (phi * ratio + 1 - phi).reshape(4, 1, 1, 1))
        torch.testing.assert_close(process.add_noise(got.x, got.eps, T), z)
    torch.testing.assert_close(said(got).flatten(1).std(1), plain.flatten(1).std(1))
    torch.testing.assert_close(Guidance(7.0, rescale=1.0).around(denoise)(z, T, cond).x, got.x)
    learned = MixtureOracle(replace(process, learned_variance=True), torch.tensor([0.6, 0.4]), MEANS, denoise.stds)
    torch.testing.assert_close(ClassifierFree(learned, 7.0, rescale=1.0)(z, T, cond).x, got.x)
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        ClassifierFree(denoise, 7.0, rescale=1.2)


def test_dynamic_thresholding() -> None:
    """Section 2.3 of arXiv:2205.11487: each image by its own quantile, and images within [-1, 1] as they are."""
    z, cond = batch()
    z = torch.cat([z[:2], 20 * z[2:]])
    inner = ClassifierFree(oracle(), 9.0)
    plain, got = inner(z, T, cond), DynamicThresholding(inner, 0.9)(z, T, cond)
    for before, after in zip(plain.x.flatten(1), got.x.flatten(1), strict=True):
        s = max(1.0, float(np.quantile(before.abs().numpy(), 0.9)))
        torch.testing.assert_close(after, (before.clamp(-s, s) / s), rtol=1e-6, atol=1e-6)
    assert float(plain.x.abs().max()) > 1 >= float(got.x.abs().max())
    assert torch.equal(Guidance(9.0, threshold=0.9).around(oracle())(z, T, cond).x, got.x)
    torch.testing.assert_close(PROCESS.add_noise(got.x, got.eps, T), z)
    calm = DynamicThresholding(oracle())(z[:1] * 0, T)
    torch.testing.assert_close(calm.x, oracle()(z[:1] * 0, T).x)
    with pytest.raises(UserError, match="quantile"):
        DynamicThresholding(inner, 1.0)


def test_formulas_differ_by_one() -> None:
    z, cond = batch()
    a, b = ClassifierFree(oracle(), 1.4)(z, T, cond), ClassifierFree(oracle(), 0.4, "cond")(z, T, cond)
    torch.testing.assert_close(a.x, b.x)


@given(first=st.floats(0, 4), second=st.floats(0, 4), share=st.floats(0, 1))
def test_linear_in_the_scale(first: float, second: float, share: float) -> None:
    z, cond = batch()
    mixed = ClassifierFree(oracle(), share * first + (1 - share) * second)(z, T, cond).x
    parts = [ClassifierFree(oracle(), s)(z, T, cond).x for s in (first, second)]
    torch.testing.assert_close(mixed, share * parts[0] + (1 - share) * parts[1])


# -- cost


@pytest.mark.parametrize(("scale", "formula"), [(1.0, "uncond"), (0.0, "cond")])
def test_no_guidance_is_the_identity_and_costs_one_call(scale: float, formula: str) -> None:
    z, cond = batch()
    plain, guided = oracle(), oracle()
    got = ClassifierFree(guided, scale, formula)(z, T, cond)  # type: ignore[arg-type]
    assert torch.equal(got.x, plain(z, T, cond).x)
    assert (guided.calls, guided.images) == (1, 4)
    # nor does it need a condition
    ClassifierFree(guided, scale, formula)(z, T, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batched", "calls"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("t", [T, T.expand(4)], ids=["one time", "a time each"])
def test_one_call_of_twice_the_batch_or_two_calls(batched: bool, calls: int, t: Tensor) -> None:
    z, cond = batch()
    guided = oracle()
    got = ClassifierFree(guided, 2.5, batched=batched)(z, t, cond)
    assert (guided.calls, guided.images) == (calls, 8)
    want = ClassifierFree(oracle(), 2.5, batched=not batched)(z, t, cond)
    torch.testing.assert_close(got.x, want.x)
    torch.testing.assert_close(got.eps, want.eps)


def test_interval_costs_one_call_outside() -> None:
    """Ten equal steps in t at 1, 0.9, ... 0.1: four of them lie in [0.35, 0.75]."""
    guided = oracle()
    denoise = ClassifierFree(guided, 3.0, interval=Interval(0.35, 0.75), batched=False)
    _, cond = batch()
    sample(denoise, DDIM(10), (1, 2, 2), range(4), cond)
    assert guided.calls == 10 + 4


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (Interval(0.2, 0.5), (0.2, 0.4, 0.5), (0.19, 0.51)),
        (Interval(-2.0, 1.0, "logsnr"), (-2.0, 0.0, 1.0), (-2.1, 1.1)),
        (Interval(0.3, 2.0, "sigma"), (0.3, 1.0, 2.0), (0.29, 2.1)),
    ],
)
def test_interval_units(interval: Interval, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    def times(values: tuple[float, ...]) -> Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        if interval.unit == "t":
            return v
        return PROCESS.schedule.time(v if interval.unit == "logsnr" else -2 * v.log())

    # the ends belong to it, up to the rounding of going there and back
    wide = Interval(interval.low - 1e-9, interval.high + 1e-9, interval.unit)
    assert wide(PROCESS, times(inside)).tolist() == [1] * len(inside)
    assert wide(PROCESS, times(outside)).tolist() == [0] * len(outside)


# -- decay


@given(u=st.floats(0, 1), power=st.floats(0.1, 8), scale=st.floats(1, 10))
def test_power_cosine_decay_of_dimr(u: float, power: float, scale: float) -> None:
    """w(t) = 1 + (X - 1) (1 - cos(pi (1 - n/1000)^p)) / 2, n = 1000 t, as DiMR's evaluation has it."""
    denoise = ClassifierFree(oracle(), scale, decay=PowerCosine(power))
    w = denoise.weight(torch.tensor(u, dtype=torch.float64), None)
    n = 1000 * u
    want = 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - n / 1000) ** power)) / 2
    assert float(w) == pytest.approx(want, rel=1e-9)


def test_decay_and_interval_multiply() -> None:
    denoise = ClassifierFree(oracle(), 3.0, interval=Interval(0.2, 0.6), decay=PowerCosine(2.0))
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    want = 1 + 2 * (1 - math.cos(math.pi * 0.6**2)) / 2
    torch.testing.assert_close(denoise.weight(t, None), torch.tensor([1.0, want, 1.0], dtype=torch.float64))


# -- scales per image and per class


def test_scale_per_image_and_per_class() -> None:
    z, cond = batch()
    scales = torch.tensor([1.0, 2.0, 4.0, 0.0])
    got = ClassifierFree(oracle(), scales)(z, T, cond)
    for i, s in enumerate(scales.tolist()):
        want = ClassifierFree(oracle(), s)(z[i : i + 1], T, cond[i : i + 1])
        torch.testing.assert_close(got.x[i : i + 1], want.x)
    by_class = ClassifierFree(oracle(), torch.tensor([1.5, 3.0]), per="class")(z, T, cond)
    torch.testing.assert_close(by_class.x, ClassifierFree(oracle(), torch.tensor([1.5, 3.0, 3.0, 1.5]))(z, T, cond).x)


def test_parts_of_a_batch_take_their_own_scales() -> None:
    z, cond = batch()
    guided = ClassifierFree(Autoguidance(oracle(), oracle(), torch.ones(4)), torch.tensor([1.0, 2.0, 4.0, 0.5]))
    part = slice(1, 3)
    torch.testing.assert_close(guided.rows(part)(z[part], T, cond[part]).x, guided(z, T, cond).x[part])


# -- autoguidance


def test_autoguidance_written_out_and_its_cost() -> None:
    z, cond = batch()
    good, weak = oracle(), MixtureOracle(PROCESS, torch.tensor([0.5, 0.5]), MEANS / 2, torch.tensor([0.9, 0.9]))
    g, w = good(z, T, cond), weak(z, T, cond)
    good.calls = weak.calls = 0
    got = Autoguidance(good, weak, 2.2)(z, T, cond)
    torch.testing.assert_close(got.x, w.x + 2.2 * (g.x - w.x))
    torch.testing.assert_close(Autoguidance(good, weak, 1.2, "cond")(z, T, cond).eps, got.eps)
    assert (good.calls, weak.calls) == (2, 2)
    assert torch.equal(Autoguidance(good, weak, 1.0)(z, T, cond).x, g.x)
    assert (good.calls, weak.calls) == (3, 2)
    Autoguidance(good, weak, 2.0, interval=Interval(0.5, 0.9))(z, T, cond)
    assert (good.calls, weak.calls) == (4, 2)


def test_autoguidance_of_an_unconditional_network_sharpens() -> None:
    """A weak network that believes in a wider law: guiding away from it narrows the images."""
    good, weak = GaussianOracle(PROCESS, 0.0, 0.5), GaussianOracle(PROCESS, 0.0, 0.8)
    spread = [
        float(sample(Autoguidance(good, weak, s), DPMSolverMultistep(30), (1, 4, 4), range(200)).std())
        for s in (1.0, 1.5, 2.0)
    ]
    assert spread[0] == pytest.approx(0.5, abs=0.02)
    assert spread[0] > spread[1] + 0.05 > spread[2] + 0.1


# -- what guidance does


def test_guidance_of_gaussians_in_closed_form() -> None:
    """Two laws of one variance and means m, 0: the guided score is that of mean w m, so the images have mean w m."""

    class TwoMeans(GaussianOracle):
        def __call__(self, z, t, cond=None):  # type: ignore[no-untyped-def]
            mean = 0.6 if cond is not None and int(cond.label[0]) == 0 else 0.0
            return GaussianOracle(self.process, mean, 0.4)(z, t)

        def null_condition(self, cond):  # type: ignore[no-untyped-def]
            return Condition(label=torch.ones_like(cond.label))

    cond = Condition(label=torch.zeros(100, dtype=torch.long))
    for w in (0.0, 1.0, 2.5):
        guided = ClassifierFree(TwoMeans(PROCESS), w, batched=False)
        x = sample(guided, DPMSolverMultistep(40, UniformLogSNR()), (1, 4, 4), range(100), cond)
        assert float(x.mean()) == pytest.approx(0.6 * w, abs=0.05)
        assert float(x.std()) == pytest.approx(0.4, abs=0.02)


def test_learned_variance_is_the_conditional_one() -> None:
    class WithVariance(MixtureOracle):
        def __call__(self, z, t, cond=None):  # type: ignore[no-untyped-def]
            return super().__call__(z, t, cond)._replace(variance=cond.label[:, None, None, None].double().expand_as(z))

    z, cond = batch()
    o = oracle()
    denoise = WithVariance(PROCESS, o.weights, o.means, o.stds)
    for batched in (True, False):
        got = ClassifierFree(denoise, 2.0, batched=batched)(z, T, cond).variance
        assert got is not None
        assert torch.equal(got[:, 0, 0, 0].long(), cond.label)


def test_a_given_null_row_replaces_the_network_s() -> None:
    z, cond = batch()
    negative = ClassifierFree(oracle(), 2.0, null=Condition(label=torch.tensor([1])))(z, T, cond)
    c, n = oracle()(z, T, cond), oracle()(z, T, Condition(label=torch.ones(4, dtype=torch.long)))
    torch.testing.assert_close(negative.x, n.x + 2 * (c.x - n.x))


# -- bad input


def test_mistakes_are_named() -> None:
    z, cond = batch()
    other = MixtureOracle(GaussianProcess(LinearTime()), torch.ones(1), torch.zeros(1, 4), torch.ones(1))
    for make, words in [
        (lambda: ClassifierFree(oracle(), 2.0)(z, T, None), "needs a condition to guide towards"),
        (lambda: ClassifierFree(oracle(), 2.0, "both"), "'uncond', 'cond', got 'both'"),  # type: ignore[arg-type]
        (lambda: ClassifierFree(oracle(), torch.ones(3) * 2)(z, T, cond), "expected 4 guidance scales"),
        (lambda: ClassifierFree(oracle(), torch.ones(2, 2)), "one guidance scale or a vector"),
        (lambda: ClassifierFree(oracle(), torch.ones(2), per="row"), "per to be one of 'image', 'class'"),  # type: ignore[arg-type]
        (lambda: ClassifierFree(oracle(), torch.ones(2) * 2, per="class")(z, T, None), "needs class labels"),
        (lambda: Autoguidance(oracle(), other, 2.0), "same schedule and path"),
        (lambda: Interval(0.5, 0.5), "low < high"),
        (lambda: Interval(0.1, 0.5, "snr"), "'t', 'logsnr', 'sigma'"),  # type: ignore[arg-type]
        (lambda: PowerCosine(0), "must be positive"),
    ]:
        with pytest.raises(UserError, match=words):
            make()
