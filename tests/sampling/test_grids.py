"""Time grids: ends, order, and the rule each one follows, on every schedule."""

import math

import pytest
import torch
from process_parts import SCHEDULES

from diffzoo.errors import UserError
from diffzoo.process import Cosine, GaussianProcess, LinearTime, Straight
from diffzoo.sampling import (
    DDIM,
    Given,
    Grid,
    Karras,
    Polyexponential,
    PowerTime,
    ShiftedTime,
    UniformLogSNR,
    UniformThenZero,
    UniformTime,
    grids,
)

GRIDS: dict[str, Grid] = {
    "time": UniformTime(),
    "time, cut": UniformTime(0.98, 1e-3),
    "then zero": UniformThenZero(),
    "log-SNR": UniformLogSNR(1.0, 1e-3),
    "quadratic": PowerTime(1.0, 1e-3),
    "power 1/2": PowerTime(power=0.5),
    "shifted": ShiftedTime(),
    "shifted to data": ShiftedTime(1.0, 0.01, 0.5),
    "Karras": Karras(1.0, 1e-3),
    "Karras, rho 3": Karras(1.0, 1e-3, 3.0),
    "polyexponential": Polyexponential(1.0, 1e-3, 2.0),
}


def test_every_grid_is_listed() -> None:
    assert {getattr(grids, n) for n in grids.__all__} - {Grid, Given} == {type(g) for g in GRIDS.values()}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_decreasing_with_exact_ends(grid: Grid, schedule: str, steps: int) -> None:
    if schedule in ("offset cosine", "improved DDPM") and grid.t_start == 1:
        grid = type(grid)(0.99, *[getattr(grid, f) for f in list(grid.__dataclass_fields__)[1:]])
    t = grid.times(GaussianProcess(SCHEDULES[schedule]), steps)
    assert t.dtype == torch.float64
    assert t.shape == (steps + 1,)
    assert (t.diff() < 0).all()
    assert float(t[0]) == grid.t_start
    assert float(t[-1]) == (0 if isinstance(grid, UniformThenZero) else grid.t_end)


def test_rules() -> None:
    process = GaussianProcess(Cosine(-9, 9))

    def equal(values: torch.Tensor) -> None:
        steps = values.diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=1e-12)

    equal(UniformTime(0.9, 0.1).times(process, 7))
    equal(UniformThenZero(0.9, 0.1).times(process, 7)[:-1])
    equal(process.logsnr(UniformLogSNR(0.9, 0.1).times(process, 7)))
    equal(PowerTime(0.9, 0.1, 3.0).times(process, 7) ** (1 / 3))
    sigma = torch.exp(-process.logsnr(Karras(0.9, 0.1).times(process, 7)) / 2)
    equal(sigma ** (1 / 7))
    u = ShiftedTime(0.9, 0.1, 3.0).times(process, 7)
    equal(u / (3 - 2 * u))


def test_shift_adds_to_the_logsnr_of_flow_matching() -> None:
    process = GaussianProcess(LinearTime(-40, 40), Straight())
    plain = UniformTime().times(process, 10)[1:-1]
    shifted = ShiftedTime(shift=3.0).times(process, 10)[1:-1]
    difference = process.logsnr(shifted) - process.logsnr(plain)
    torch.testing.assert_close(difference, torch.full_like(difference, -2 * math.log(3)), rtol=1e-6, atol=1e-6)


def test_edm_grid() -> None:
    """Eq. 5 of arXiv:2206.00364 with its own numbers."""
    process = GaussianProcess(Cosine(-15, 15))
    sigma = torch.exp(-process.logsnr(Karras.for_sigmas(process).times(process, 17)) / 2)
    i = torch.arange(18, dtype=torch.float64)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, want, rtol=1e-7, atol=0)
    assert Karras.for_sigmas(process, 1e-9, 1e9) == Karras(1.0, 0.0), "cut to what the schedule covers"


def test_polyexponential_sigmas() -> None:
    """The grid of that name in k-diffusion: log sigma from its largest to its smallest value as (1 - u)^rho."""
    process = GaussianProcess(Cosine(-15, 15))
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for rho in (1.0, 0.5, 3.0):
        sigma = torch.exp(-process.logsnr(Polyexponential.for_sigmas(process, 0.01, 50, rho=rho).times(process, 8)) / 2)
        want = torch.exp((1 - u) ** rho * (math.log(50) - math.log(0.01)) + math.log(0.01))
        torch.testing.assert_close(sigma, want, rtol=1e-7, atol=0)
    exponential = UniformLogSNR.for_sigmas(process, 0.01, 50).times(process, 8)
    torch.testing.assert_close(exponential, Polyexponential.for_sigmas(process, 0.01, 50).times(process, 8))


def test_given_values() -> None:
    process = GaussianProcess(Cosine(-15, 15))
    times = [0.9, 0.5, 0.2, 0.05]
    logsnr = process.logsnr(torch.tensor(times, dtype=torch.float64))
    for values, unit in ((times, "t"), (logsnr.tolist(), "logsnr"), (torch.exp(-logsnr / 2).tolist(), "sigma")):
        got = DDIM(3, Given(values=values, unit=unit)).times(process)
        torch.testing.assert_close(got, torch.tensor(times, dtype=torch.float64))
    for values, unit, steps, words in (
        ([2.0, 1.0], "sigma", 3, "2 values make 1 steps, got steps=3"),
        ([1e5, 1.0], "sigma", 1, "sigma = 100000 lies outside"),
        ([1.5, 0.5], "t", 1, "t = 1.5 lies outside"),
    ):
        with pytest.raises(UserError, match=words):
            Given(values=values, unit=unit).times(process, steps)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Given(values=(0.2, 0.5)), "strictly decreasing values of t"),
        (lambda: Given(values=(0.2, 0.1), unit="logsnr"), "strictly increasing values of logsnr"),
        (lambda: Given(values=(1.0, 0.0), unit="sigma"), "leave out the last 0"),
        (lambda: Given(values=(1.0, 0.0), unit="s"), "got 's'"),
        (lambda: Polyexponential(rho=0), "must be positive"),
        (lambda: UniformTime(0.2, 0.5), "t_end < t_start"),
        (lambda: UniformTime(1.5), "t_start <= 1"),
        (lambda: PowerTime(power=0), "must be positive"),
        (lambda: ShiftedTime(shift=-1), "must be positive"),
        (lambda: Karras(rho=0), "must be positive"),
        (lambda: UniformThenZero().times(GaussianProcess(), 1), "at least 2 steps"),
    ],
)
def test_bad_arguments(make: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()  # type: ignore[operator]
