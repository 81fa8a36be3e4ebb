"""The discrete chain against Bayes' rule, identities and limits; respacing; bad input."""

import math
from itertools import pairwise

import pytest
import torch
from discrete_chain import RespacedSteps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process import Cosine, DiscreteBetas, Eps, Estimate, GaussianProcess, TimeConditioning
from diffzoo.process.discrete import (
    _log_likelihood,
    discrete_schedule,
    hybrid_loss,
    kept_steps,
    prior_bits,
    reverse_moments,
    reverse_step,
    variational_bound,
)

SCHEDULES = [
    DiscreteBetas("linear"),
    DiscreteBetas("cosine"),
    DiscreteBetas("scaled_linear"),
    DiscreteBetas("cosine", 40),
]


def process(schedule: DiscreteBetas = SCHEDULES[0], learned: bool = True) -> GaussianProcess:
    return GaussianProcess(
        schedule, prediction=Eps(), noise_conditioning=TimeConditioning(schedule.steps, -1.0), learned_variance=learned
    )


# -- respacing


@given(steps=st.integers(2, 400), data=st.data())
def test_even_respacing_keeps_both_ends(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, steps))
    kept = kept_steps(str(count), steps)
    gaps = {b - a for a, b in pairwise(kept)}
    assert (len(kept), kept[0], kept[-1]) == (count, 0, steps - 1)
    assert max(gaps) - min(gaps) <= 1


@given(steps=st.integers(2, 400), stride=st.integers(1, 400))
def test_ddim_respacing_has_one_stride_from_zero(steps: int, stride: int) -> None:
    count = len(range(0, steps, stride))
    kept = kept_steps(f"ddim{count}", steps)
    assert len(kept) == count
    assert kept[0] == 0
    assert len({b - a for a, b in pairwise(kept)}) <= 1


def test_sections_are_equally_long() -> None:
    kept = kept_steps("90,60,60,20,20", 1000)
    assert [sum(lo <= k < lo + 200 for k in kept) for lo in range(0, 1000, 200)] == [90, 60, 60, 20, 20]
    # the first sections take what does not divide: 4 + 3 + 3
    assert kept_steps("4,3,3", 10) == tuple(range(10))
    assert kept_steps(None, 5) == kept_steps("", 5) == kept_steps(5, 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("respacing", "steps", "message"),
    [
        ("ddim37", 1000, r"no whole stride gives 37 of 1000 steps: use 'ddim36' or 'ddim38', or '37'"),
        ("ddim2000", 1000, r"use 'ddim1000'$"),
        ("11", 10, "cannot keep 11 of 10 steps"),
        ("5,5,1", 10, r"sections of 3 or more, so each count can be 3 at most, got 5,5,1"),
        ("many", 10, "cannot read the respacing 'many'"),
        ("ddim", 10, "cannot read"),
        ("0", 10, "cannot read"),
        ("3,", 10, "cannot read"),
    ],
)
def test_counts_that_no_respacing_gives(respacing: str, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kept_steps(respacing, steps)


def test_continuous_schedules_have_no_steps() -> None:
    with pytest.raises(UserError, match="table of steps"):
        discrete_schedule(GaussianProcess(Cosine()))


# -- tables


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_process_and_table_agree_to_float64(schedule: DiscreteBetas) -> None:
    chain = RespacedSteps(schedule)
    alpha, sigma = process(schedule).coefficients(chain.times)
    inside = schedule.log_alpha > -0.5 * math.log1p(math.exp(schedule.max_logsnr))
    torch.testing.assert_close(alpha[inside], chain.log_alpha.exp()[inside], rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, (-torch.expm1(2 * chain.log_alpha)).sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.log_alpha_at(chain.times), chain.log_alpha, rtol=1e-12, atol=0)
    assert torch.equal(schedule.log_alpha_at(torch.zeros(2)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("respacing", [None, "10", "ddim20", "8,2"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_respaced_betas_lead_to_the_same_noise(schedule: DiscreteBetas, respacing: str | None) -> None:
    chain = RespacedSteps(schedule, respacing)
    product = torch.cumprod(1 - chain.reverse.log_beta.exp(), 0)
    torch.testing.assert_close(product, (2 * chain.log_alpha).exp(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("respacing", [None, "10", "ddim20"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_reverse_step_is_bayes_rule(schedule: DiscreteBetas, respacing: str | None) -> None:
    # prior z_s | x ~ N(a_s x, s_s^2), likelihood z_t | z_s ~ N(sqrt(1 - beta) z_s, beta): precisions add
    step = RespacedSteps(schedule, respacing).reverse
    alpha_bar = (2 * RespacedSteps(schedule, respacing).log_alpha).exp()
    before, now = alpha_bar[:-1], alpha_bar[1:]
    beta = 1 - now / before
    precision = 1 / (1 - before) + (1 - beta) / beta
    want = {
        "variance": 1 / precision,
        "mean_x": before.sqrt() / (1 - before) / precision,
        "mean_z": (1 - beta).sqrt() / beta / precision,
    }
    for name, value in want.items():
        torch.testing.assert_close(getattr(step, name)[1:], value, rtol=1e-7, atol=0)
    assert (step.variance[0], step.mean_z[0]) == (0, 0)
    assert step.mean_x[0] == pytest.approx(1, abs=1e-12)
    assert step.log_variance[0] == step.log_variance[1]


@pytest.mark.parametrize(("v", "which"), [(1.0, "log_beta"), (-1.0, "log_variance")])
def test_learned_variance_reaches_its_bounds(v: float, which: str) -> None:
    step = RespacedSteps(SCHEDULES[0], "10").reverse
    z = torch.randn(10, 1, 2, 2, dtype=torch.float64)
    estimate = Estimate(torch.zeros_like(z), z, torch.full_like(z, v))
    moments = reverse_moments(step, estimate, z, "learned")
    torch.testing.assert_close(moments.log_variance[:, 0, 0, 0], getattr(step, which))
    # and goes beyond them: v is not clamped
    beyond = reverse_moments(step, estimate._replace(variance=torch.full_like(z, 3.0)), z, "learned")
    assert (beyond.log_variance[:, 0, 0, 0] > step.log_beta)[1:].all()


def test_fixed_variances() -> None:
    step = RespacedSteps(SCHEDULES[0], "10").reverse
    z = torch.randn(10, 1, 1, 1, dtype=torch.float64)
    small, large = (reverse_moments(step, Estimate(z, z), z, kind) for kind in ("fixed_small", "fixed_large"))
    torch.testing.assert_close(small.variance.flatten(), step.variance)
    torch.testing.assert_close(large.variance.flatten()[1:], step.log_beta.exp()[1:])
    assert large.variance[0] == pytest.approx(float(step.variance[1]))
    with pytest.raises(UserError, match="no learned variance"):
        reverse_moments(step, Estimate(z, z), z, "learned")


def test_one_step_from_anywhere_ends_at_the_data() -> None:
    step = reverse_step(torch.tensor(-2.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert (float(step.mean_x), float(step.mean_z), float(step.variance)) == (pytest.approx(1), 0, 0)
    assert step.log_variance == step.log_beta


# -- the loss


def noised(schedule: DiscreteBetas, index: list[int]) -> tuple[GaussianProcess, Tensor, Tensor, Tensor, Tensor]:
    p = process(schedule)
    x = torch.rand(len(index), 3, 4, 4, dtype=torch.float64) * 2 - 1
    eps = torch.randn_like(x)
    t = RespacedSteps(schedule).times[torch.tensor(index)]
    return p, x, eps, p.add_noise(x, eps, t), t


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_true_reverse_step_costs_nothing(schedule: DiscreteBetas) -> None:
    p, x, eps, z, t = noised(schedule, [1, 5, 20, 39])
    output = torch.cat([eps, -torch.ones_like(eps)], dim=1)  # exact noise, variance at its lower bound
    assert variational_bound(p, output, x, z, t).abs().max() < 1e-9
    assert hybrid_loss(p, output, x, z, eps, t).abs().max() < 1e-9


def test_a_too_large_variance_costs_its_divergence() -> None:
    p, x, eps, z, t = noised(SCHEDULES[0], [300])
    step = RespacedSteps(SCHEDULES[0]).step(300)
    ratio = torch.exp(step.log_variance - step.log_beta)
    want = 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    got = variational_bound(p, torch.cat([eps, torch.ones_like(eps)], dim=1), x, z, t)
    assert float(got) == pytest.approx(float(want), rel=1e-9)


def test_an_error_of_the_mean_costs_its_square() -> None:
    p, x, eps, z, t = noised(SCHEDULES[0], [300])
    step = RespacedSteps(SCHEDULES[0]).step(300)
    alpha, sigma = p.coefficients(t)
    error = 0.1
    got = variational_bound(p, torch.cat([eps + error, -torch.ones_like(eps)], dim=1), x, z, t)
    shift = float(step.mean_x * sigma / alpha) * error
    assert float(got) == pytest.approx(shift**2 / (2 * float(step.variance)) / math.log(2), rel=1e-6)


def test_last_step_is_the_likelihood_of_256_levels() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, scale in ((0.3, 0.02), (-0.98, 0.1), (0.9, 0.5)):
        total = _log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(math.log(scale)).double()).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-9)
    # black is an open bin, of which the exact model puts Phi(half a level / its deviation) on the right side
    p, _, eps, _, t = noised(SCHEDULES[0], [0])
    x = torch.full_like(eps, -1.0)
    exact = torch.cat([eps, -torch.ones_like(eps)], dim=1)
    deviation = float(RespacedSteps(SCHEDULES[0]).reverse.variance[1]) ** 0.5
    share = 0.5 * (1 + math.erf(1 / 255 / deviation / math.sqrt(2)))
    got = variational_bound(p, exact, x, p.add_noise(x, eps, t), t)
    assert float(got) == pytest.approx(-math.log2(share), rel=1e-3)


def test_the_bound_does_not_teach_the_mean() -> None:
    p, x, eps, z, t = noised(SCHEDULES[1], [0, 10, 39])
    output = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(hybrid_loss(p, output, x, z, eps, t).sum(), output)
    n = eps[0].numel()
    torch.testing.assert_close(grad[:, :3], 2 * (output[:, :3] - eps).detach() / n)
    assert grad[:, 3:].abs().min() > 0
    (twice,) = torch.autograd.grad(hybrid_loss(p, output, x, z, eps, t, 2.0).sum(), output)
    torch.testing.assert_close(twice[:, 3:], 2 * grad[:, 3:])


@given(t=st.floats(0, 1, width=32))
def test_any_time_can_be_trained_on(t: float) -> None:
    p = process(SCHEDULES[1])
    x, eps, times = torch.zeros(1, 3, 2, 2), torch.randn(1, 3, 2, 2), torch.tensor([t])
    output = torch.randn(1, 6, 2, 2, requires_grad=True)
    loss = hybrid_loss(p, output, x, p.add_noise(x, eps, times), eps, times)
    loss.backward()
    assert loss.isfinite()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_float32_times_mean_the_steps_they_round_to() -> None:
    p, x, _, z, t = noised(SCHEDULES[1], [1, 7, 20, 39])
    output = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        variational_bound(p, output, x, z, t.float()), variational_bound(p, output, x, z, t), rtol=1e-5, atol=0
    )


def test_prior_bits_against_monte_carlo() -> None:
    schedule = DiscreteBetas("linear", 1000, 1e-4, 2e-3)  # ends with much signal left, so that the number is large
    p = process(schedule)
    x = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64)
    alpha, sigma = (float(c) for c in p.coefficients(torch.tensor(1.0, dtype=torch.float64)))
    z = alpha * 0.8 + sigma * torch.randn(400_000, dtype=torch.float64)
    log_ratio = -((z - alpha * 0.8) ** 2) / (2 * sigma**2) - math.log(sigma) + z**2 / 2
    assert float(prior_bits(p, x)) == pytest.approx(float(log_ratio.mean()) / math.log(2), rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_training_times_are_the_steps_equally_often(schedule: DiscreteBetas) -> None:
    n = schedule.steps
    snapped = schedule.snap((torch.arange(10 * n) + 0.5) / (10 * n))
    assert torch.equal((snapped * n).round().long().bincount(minlength=n + 1)[1:], torch.full((n,), 10))
    steps = RespacedSteps(schedule).times.float()
    assert torch.equal(schedule.snap(steps), steps)
    assert schedule.snap(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1 / n, 1])
    assert Cosine().snap(steps) is steps


def test_processes_can_be_made_while_networks_are_on_the_meta_device() -> None:
    with torch.device("meta"):
        made = [process(DiscreteBetas(kind, 50)) for kind in ("linear", "cosine", "scaled_linear")]  # type: ignore[arg-type]
    for p in made:
        assert p.coefficients(torch.tensor(0.5))[0].isfinite()


# -- estimates


@given(limit=st.floats(0.1, 2), t=st.floats(0.01, 0.99))
def test_clipped_estimates_stay_consistent(limit: float, t: float) -> None:
    p = process(SCHEDULES[0])
    z, times = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    estimate = p.interpret(torch.randn(2, 6, 2, 2, dtype=torch.float64), z, times)
    alpha, sigma = p.coefficients(times)
    for changed in (p.clip(estimate, z, times, limit), p.add_score(estimate, z, times, torch.randn_like(z))):
        torch.testing.assert_close(alpha * changed.x + sigma * changed.eps, z)
        assert changed.variance is estimate.variance
    assert p.clip(estimate, z, times, limit).x.abs().max() <= limit


def test_adding_a_score_is_bayes_rule_for_gaussian_data() -> None:
    # data N(0, 1) on the VP path: z ~ N(0, 1), eps_hat = sigma z. Observing z + N(0, r^2) = y tilts it to
    # N(y / (1 + r^2), r^2 / (1 + r^2)), whose score is -z + (y - z) / r^2
    p = process(SCHEDULES[0], learned=False)
    z, t, y, r = torch.randn(4, 1, 1, 1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), 0.7, 0.5
    sigma = p.coefficients(t)[1]
    got = p.add_score(p.interpret(sigma * z, z, t), z, t, (y - z) / r**2)
    mean, variance = y / (1 + r**2), r**2 / (1 + r**2)
    torch.testing.assert_close(got.eps, sigma * (z - mean) / variance)
