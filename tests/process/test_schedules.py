"""Properties of every noise schedule: monotone, invertible, bounded, with the derivative that autograd finds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_parts import INSIDE, SCHEDULES

from diffzoo.errors import UserError
from diffzoo.process import (
    Cosine,
    DiscreteBetas,
    Interpolated,
    LinearBeta,
    LinearTime,
    OffsetCosine,
    Schedule,
    Shifted,
    schedules,
)

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
fractions = st.floats(0, 1, allow_nan=False)
bounds = st.tuples(st.floats(-20, -1), st.floats(1, 20))
resolutions = st.integers(4, 1024)


def inside(name: str, u: float) -> torch.Tensor:
    low, high = INSIDE.get(name, (0.0, 1.0))
    return torch.tensor(low + u * (high - low), dtype=torch.float64)


def test_every_class_is_listed() -> None:
    classes = {getattr(schedules, n) for n in schedules.__all__} - {Schedule}
    assert classes == {type(s) for s in SCHEDULES.values()}


@every_schedule
def test_strictly_decreasing(name: str) -> None:
    t = inside(name, 0) + torch.linspace(0, 1, 5001, dtype=torch.float64) * (inside(name, 1) - inside(name, 0))
    assert (SCHEDULES[name].logsnr(t).diff() < 0).all()


@every_schedule
@settings(max_examples=25)
@given(u=fractions)
def test_time_inverts_logsnr(name: str, u: float) -> None:
    schedule, t = SCHEDULES[name], inside(name, u)
    logsnr = schedule.logsnr(t)
    # as exact as float64 allows: an ulp of log-SNR is worth so much time
    slack = 1e-12 + 1e-13 * (1 + float(logsnr.abs())) / float(-schedule.derivative(t))
    assert float((schedule.time(logsnr) - t).abs()) < slack


@every_schedule
@settings(max_examples=25)
@given(u=fractions)
def test_logsnr_inverts_time(name: str, u: float) -> None:
    schedule = SCHEDULES[name]
    high, low = schedule.logsnr(inside(name, 0)), schedule.logsnr(inside(name, 1))
    logsnr = low + u * (high - low)
    assert float((schedule.logsnr(schedule.time(logsnr)) - logsnr).abs()) < 1e-7


@every_schedule
@settings(max_examples=25)
@given(u=st.floats(0.001, 0.999))
def test_derivative_is_autograd_s(name: str, u: float) -> None:
    schedule = SCHEDULES[name]
    t = inside(name, u).requires_grad_()
    (automatic,) = torch.autograd.grad(schedule.logsnr(t), t)
    torch.testing.assert_close(schedule.derivative(t.detach()), automatic, rtol=1e-8, atol=1e-8)


@every_schedule
def test_keeps_shape_and_dtype_and_is_precise_in_float32(name: str) -> None:
    schedule = SCHEDULES[name]
    t = inside(name, 0) + torch.rand(3, 4, dtype=torch.float64) * (inside(name, 1) - inside(name, 0))
    low = t.float()
    for method in (schedule.logsnr, schedule.derivative):
        assert method(low).dtype == torch.float32
        assert method(low).shape == (3, 4)
        # the arithmetic is in float64: the only error is the rounding of the result
        torch.testing.assert_close(method(low), method(low.double()).float(), rtol=0, atol=0)


@every_schedule
def test_reported_ends_are_the_ends(name: str) -> None:
    schedule = SCHEDULES[name]
    ends = schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    assert [schedule.logsnr_min, schedule.logsnr_max] == pytest.approx(ends, abs=1e-12)
    assert all(math.isfinite(e) for e in ends)


@pytest.mark.parametrize("kind", [Cosine, LinearTime])
@given(limits=bounds)
def test_bounds_are_hit(kind: type[Cosine] | type[LinearTime], limits: tuple[float, float]) -> None:
    schedule = kind(*limits)
    assert schedule.logsnr_min == pytest.approx(limits[0], abs=1e-6)
    assert schedule.logsnr_max == pytest.approx(limits[1], abs=1e-6)


@given(u=fractions, reference=resolutions, resolution=resolutions)
def test_shift_adds_twice_the_log_ratio(u: float, reference: int, resolution: int) -> None:
    t = torch.tensor(u, dtype=torch.float64)
    difference = Shifted(Cosine(), reference, resolution).logsnr(t) - Cosine().logsnr(t)
    assert float(difference) == pytest.approx(2 * math.log(reference / resolution), abs=1e-9)


def test_shift_is_what_average_pooling_undoes() -> None:
    """Pooling s x s pixels of the shifted process gives the log-SNR of the base: the reason for the shift."""
    base, s = Cosine(), 4
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    snr = Shifted(base, 64, 64 * s).logsnr(t).exp()
    torch.testing.assert_close((snr * s**2).log(), base.logsnr(t))


def test_published_shifts() -> None:
    """2 log(reference / resolution) as tabulated for Simple Diffusion."""
    table = {(32, 64): -1.386, (64, 128): -1.386, (32, 128): -2.773, (64, 512): -4.159, (32, 512): -5.545}
    for (reference, resolution), shift in table.items():
        assert Shifted(Cosine(), reference, resolution).shift == pytest.approx(shift, abs=5e-4)


@given(u=fractions)
def test_interpolation_lies_between_its_ends_and_reaches_them(u: float) -> None:
    data, noise = Shifted(Cosine(), 256, 512), Shifted(Cosine(), 32, 512)
    schedule = Interpolated(data, noise)
    t = torch.tensor(u, dtype=torch.float64)
    assert float(noise.logsnr(t)) - 1e-9 <= float(schedule.logsnr(t)) <= float(data.logsnr(t)) + 1e-9
    assert schedule.logsnr_max == pytest.approx(data.logsnr_max)
    assert schedule.logsnr_min == pytest.approx(noise.logsnr_min)


def test_interpolation_is_steeper_in_the_middle() -> None:
    """The direction of the paper's text: log-SNR is spread more evenly than by either end."""
    data, noise = Shifted(Cosine(), 256, 512), Shifted(Cosine(), 32, 512)
    middle = torch.tensor(0.5, dtype=torch.float64)
    assert Interpolated(data, noise).derivative(middle) < data.derivative(middle) - 2


def test_cosine_is_tan() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(
        Cosine(-40, 40).logsnr(t), -2 * torch.log(torch.tan(math.pi * t / 2)), rtol=1e-6, atol=1e-6
    )


def test_linear_time_keeps_its_digits_at_both_ends() -> None:
    """1 - sigma is below the spacing of numbers at 1 from a log-SNR of -74 on."""
    schedule = LinearTime(-200, 200)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.logsnr(ends), torch.tensor([200.0, -200.0], dtype=torch.float64))
    assert torch.isfinite(schedule.derivative(ends)).all()


def test_linear_time_is_flow_matching() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(LinearTime(-40, 40).logsnr(t), 2 * torch.log((1 - t) / t), rtol=1e-6, atol=1e-6)


def test_linear_beta_integrates_its_beta() -> None:
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(0.1 + 19.9 * t, t)
    log_alpha_squared = -torch.nn.functional.softplus(-LinearBeta().logsnr(t))
    torch.testing.assert_close(log_alpha_squared[1:], -integral, rtol=1e-6, atol=1e-8)


def test_offset_cosine_is_the_discrete_one_in_the_limit() -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    discrete = DiscreteBetas("cosine", 8000)
    torch.testing.assert_close(discrete.logsnr(t), OffsetCosine().logsnr(t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_discrete_tables_multiply_up(kind: str) -> None:
    schedule = DiscreteBetas(kind, 50)  # type: ignore[arg-type]
    product, want = 1.0, []
    for beta in schedule.betas.tolist():
        product *= 1 - beta
        want.append(math.log(product / (1 - product)))
    t = torch.arange(1, 51, dtype=torch.float64) / 50
    torch.testing.assert_close(schedule.logsnr(t), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_zero_terminal_snr() -> None:
    """Algorithm 1 of arXiv:2305.08891 written out; only the last step differs, being next to zero instead of zero."""
    plain = DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012)
    root = (1 - plain.betas).cumprod(0).sqrt()
    wanted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = SCHEDULES["zero terminal SNR"]
    assert isinstance(rescaled, DiscreteBetas)
    torch.testing.assert_close(rescaled.log_alpha.exp()[:-1], wanted[:-1])
    assert float(rescaled.log_alpha[-1].exp()) == pytest.approx(math.exp(-10), rel=1e-6)
    assert rescaled.logsnr_min == pytest.approx(-20)
    torch.testing.assert_close((1 - rescaled.betas).cumprod(0).sqrt(), rescaled.log_alpha.exp())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cosine(3, 1), "min_logsnr < max_logsnr"),
        (lambda: LinearTime(-math.inf, 1), "finite bounds"),
        (lambda: Shifted(Cosine(), 0, 64), "positive"),
        (lambda: Interpolated(Shifted(Cosine(), 32, 512), Cosine()), "swap"),
        (lambda: LinearBeta(2, 1), "beta_min <= beta_max"),
        (lambda: OffsetCosine(0), "positive"),
        (lambda: DiscreteBetas("quadratic"), "quadratic"),  # type: ignore[arg-type]
        (lambda: DiscreteBetas(steps=1), "at least 2"),
    ],
)
def test_bad_arguments(make: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()  # type: ignore[operator]
