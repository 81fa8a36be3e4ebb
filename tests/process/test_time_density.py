"""Densities of training times: the map and its density agree, published values, the identity with a weighting."""

import math

import pytest
import torch
from process_parts import SCHEDULES

from diffzoo.errors import UserError
from diffzoo.process import Cosine, GaussianProcess, LinearTime, Straight, time_density
from diffzoo.process.time_density import CosMap, LogitNormal, LogNormalSigma, TimeDensity

DENSITIES: dict[str, TimeDensity] = {
    "logit-normal": LogitNormal(),
    "logit-normal, to noise": LogitNormal(0.5, 0.8),
    "cosine map": CosMap(),
    "EDM": LogNormalSigma(),
}
PROCESS = GaussianProcess(Cosine(-12, 12))
every_density = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)


def test_every_density_is_listed() -> None:
    classes = {getattr(time_density, name) for name in time_density.__all__} - {TimeDensity}
    assert classes == {type(d) for d in DENSITIES.values()}


@every_density
def test_the_map_has_the_density(density: TimeDensity) -> None:
    """du / dt along the map is p(t)."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    t = density.times(PROCESS, u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    assert bool((t.diff() > 0).all())
    torch.testing.assert_close(density.density(PROCESS, t.detach()), 1 / slope, rtol=1e-5, atol=0)


@every_density
def test_drawing_is_weighing(density: TimeDensity) -> None:
    """(1): the mean over drawn times is the integral with the density as a weight."""
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = torch.sin(3 * density.times(PROCESS, uniform)).mean()
    weighed = (density.density(PROCESS, uniform) * torch.sin(3 * uniform)).mean()
    torch.testing.assert_close(drawn, weighed, rtol=1e-4, atol=1e-5)


@every_density
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_are_times(density: TimeDensity, schedule: str) -> None:
    t = density.times(GaussianProcess(SCHEDULES[schedule]), torch.linspace(0, 1, 101)[:-1])
    assert t.dtype == torch.float32
    assert bool(((t >= 0) & (t <= 1)).all())


def test_cosine_map_is_the_cosine_schedule_on_the_straight_path() -> None:
    """Section 3.1 of arXiv:2403.03206: alpha : sigma is that of the cosine schedule, cos : sin."""
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    flow = GaussianProcess(LinearTime(-40, 40), Straight())
    ratio = torch.exp(-flow.logsnr(CosMap().times(flow, u)) / 2)
    torch.testing.assert_close(ratio, torch.tan(math.pi / 2 * u), rtol=1e-6, atol=0)


def test_edm_s_density() -> None:
    sigma = torch.exp(-PROCESS.logsnr(LogNormalSigma().times(PROCESS, torch.tensor([0.5, 0.841344746]))) / 2)
    torch.testing.assert_close(sigma.log(), torch.tensor([-1.2, 0.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: LogitNormal(std=0), lambda: LogNormalSigma(std=-1)])
def test_bad_arguments(make: object) -> None:
    with pytest.raises(UserError, match="must be positive"):
        make()  # type: ignore[operator]
