"""Every sampler converges to the exact solution with the order it claims, on every path.

To add a sampler, add one line to `DETERMINISTIC` or `STOCHASTIC`.

On Gaussian data the ODE has a closed solution (`oracles.py`). Log-SNR runs from -12 to 2: an interval that is not
symmetric, since on a symmetric one the leading error of third-order methods cancels and they look like fourth.
Stochastic samplers are linear in z and in their noise here, so mean and variance of what they return are computed
exactly, by sending unit vectors through them, and their weak order is measured without a single random number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from oracles import GaussianOracle, Replay
from process_parts import PATHS
from torch import Tensor

from diffzoo import sampling
from diffzoo.process import Cosine, Estimate, GaussianProcess, LinearLogSNR, Path
from diffzoo.sampling import (
    DDIM,
    DEIS,
    DPM2,
    LMS,
    AdjustedDDIM,
    Ancestral,
    DPMSolver,
    DPMSolverAncestral,
    DPMSolverMultistep,
    DPMSolverSDE,
    EDMEuler,
    Euler,
    EulerMaruyama,
    FlowHeun,
    Heun,
    Karras,
    KarrasStops,
    MultistepConsistency,
    Sampler,
    UniformLogSNR,
    UniformTime,
    UniPC,
    integrate,
)
from diffzoo.typing import Condition

LOGSNR = UniformLogSNR()


class Claim(NamedTuple):
    """The order a sampler claims, how to make it for a number of steps, and the range of log-SNR for the test."""

    order: int
    make: Callable[[int], Sampler]
    start: float = -12.0
    steps: tuple[int, ...] = (32, 64, 128, 256)


DETERMINISTIC = {
    "DDIM": Claim(1, lambda n: DDIM(n, LOGSNR, final="state")),
    "aDDIM": Claim(1, lambda n: AdjustedDDIM(n, LOGSNR, final="state")),
    "DPM-Solver++ (2M)": Claim(2, lambda n: DPMSolverMultistep(n, LOGSNR, final="state")),
    "DPM-Solver++ (3M)": Claim(3, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", order=3)),
    "DPM-Solver (2M), noise": Claim(2, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", form="noise")),
    "DPM-Solver (3M), noise": Claim(3, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", order=3, form="noise")),
    "DPM-Solver++ (1S)": Claim(1, lambda n: DPMSolver(n, LOGSNR, order=1, method="singlestep", inner="logsnr")),
    "DPM-Solver++ (2S)": Claim(2, lambda n: DPMSolver(n, LOGSNR, order=2, method="singlestep", inner="logsnr")),
    "DPM-Solver++ (3S)": Claim(
        3, lambda n: DPMSolver(n, LOGSNR, order=3, method="singlestep", inner="logsnr"), steps=(66, 132, 264)
    ),
    "DPM-Solver (2S), noise": Claim(
        2, lambda n: DPMSolver(n, LOGSNR, order=2, form="noise", method="singlestep", inner="logsnr")
    ),
    "DPM-Solver (3S), noise": Claim(
        3,
        lambda n: DPMSolver(n, LOGSNR, order=3, form="noise", method="singlestep", inner="logsnr"),
        steps=(66, 132, 264),
    ),
    "DEIS (2)": Claim(2, lambda n: DEIS(n, LOGSNR, final="state", order=2)),
    "DEIS (3)": Claim(3, lambda n: DEIS(n, LOGSNR, final="state")),
    "UniPC (1)": Claim(2, lambda n: UniPC(n, LOGSNR, final="state", order=1)),
    "UniPC (2)": Claim(3, lambda n: UniPC(n, LOGSNR, final="state"), steps=(256, 512)),
    "UniPC (3)": Claim(4, lambda n: UniPC(n, LOGSNR, final="state", order=3)),
    "UniPC (2), noise": Claim(3, lambda n: UniPC(n, LOGSNR, final="state", form="noise"), steps=(128, 256)),
    # "fast" ends in a smaller group; one of 2 leaves the order at 3, one of 1 makes a last step of first order
    "DPM-Solver++ fast": Claim(3, lambda n: DPMSolver(n - n % 3 + 2, LOGSNR)),
    "DPM-Solver fast, noise": Claim(3, lambda n: DPMSolver(n - n % 3 + 2, LOGSNR, form="noise", inner="logsnr")),
    "Heun": Claim(2, lambda n: Heun(n, Karras(), final="state")),
    "EDM's Euler": Claim(1, lambda n: EDMEuler(n, LOGSNR, final="state")),
    "DPM2": Claim(2, lambda n: DPM2(n, LOGSNR, final="state")),
    "LMS (2)": Claim(2, lambda n: LMS(n, Karras(), final="state", order=2)),
    "LMS (3)": Claim(3, lambda n: LMS(n, Karras(), final="state", order=3), steps=(128, 256, 512)),
    "LMS (4)": Claim(4, lambda n: LMS(n, Karras(), final="state"), steps=(192, 384)),
    "Euler": Claim(1, lambda n: Euler(n, UniformTime(), final="state"), -4.0),
    "Heun in t": Claim(2, lambda n: FlowHeun(n, UniformTime(), euler_end=False), -4.0),
}
STOCHASTIC = {
    "ancestral, gamma 0": Claim(1, lambda n: Ancestral(n, LOGSNR, final="state", gamma=0.0)),
    "ancestral, gamma 0.2": Claim(1, lambda n: Ancestral(n, LOGSNR, final="state")),
    "ancestral, gamma 1": Claim(1, lambda n: Ancestral(n, LOGSNR, final="state", gamma=1.0)),
    "DDIM, eta 1": Claim(1, lambda n: DDIM(n, LOGSNR, final="state", eta=1.0)),
    "DDIM, eta 0.5": Claim(1, lambda n: DDIM(n, LOGSNR, final="state", eta=0.5)),
    "SDE-DPM-Solver++ (1)": Claim(1, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", order=1, eta=1.0)),
    "SDE-DPM-Solver++ (2M)": Claim(2, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", eta=1.0)),
    "SDE-DPM-Solver++ (2M), eta 0.5": Claim(2, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", eta=0.5)),
    # a better constant, not a higher order
    "SDE-DPM-Solver++ (3M)": Claim(
        2, lambda n: DPMSolverMultistep(n, LOGSNR, final="state", order=3, eta=1.0), steps=(1024, 2048)
    ),
    "DPM-Solver++ (2S), ancestral": Claim(2, lambda n: DPMSolverAncestral(n, LOGSNR, final="state")),
    "DPM-Solver++ (2S), ancestral, eta 0.5": Claim(2, lambda n: DPMSolverAncestral(n, LOGSNR, final="state", eta=0.5)),
    "DPM++ SDE": Claim(2, lambda n: DPMSolverSDE(n, LOGSNR, final="state")),
    "DPM++ SDE, eta 0.5": Claim(2, lambda n: DPMSolverSDE(n, LOGSNR, final="state", eta=0.5)),
    "EDM's Euler with churn": Claim(1, lambda n: EDMEuler(n, LOGSNR, final="state", churn=4.0)),
    "DPM2 with churn": Claim(2, lambda n: DPM2(n, LOGSNR, final="state", churn=4.0)),
    "Heun with churn": Claim(2, lambda n: Heun(n, LOGSNR, final="state", churn=4.0)),
    "Euler-Maruyama": Claim(1, lambda n: EulerMaruyama(n, UniformTime(t_end=1e-9), final="state"), -4.0),
    "Euler-Maruyama, double": Claim(
        1, lambda n: EulerMaruyama(n, UniformTime(t_end=1e-9), final="state", strength=2.0), -4.0
    ),
    "Euler-Maruyama, D = sigma / 2": Claim(
        1, lambda n: EulerMaruyama(n, UniformTime(t_end=1e-9), final="state", diffusion="sigma"), -4.0
    ),
}


def on_every_path(claims: dict[str, Claim]) -> pytest.MarkDecorator:
    """Samplers in log-SNR cannot tell the paths apart (see the last test), so two of three are left to slow runs."""
    cases = [
        pytest.param(name, path, id=f"{name}-{where}", marks=[pytest.mark.slow] * (claim.start == -12 and i > 0))
        for name, claim in claims.items()
        for i, (where, path) in enumerate(PATHS.items())
    ]
    return pytest.mark.parametrize(("name", "path"), cases)


def slope(steps: list[int], errors: list[float]) -> float:
    """The order of convergence: minus the slope of log error over log steps, by least squares."""
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (steps, errors))
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def oracle_of(claim: Claim, path: Path) -> GaussianOracle:
    return GaussianOracle(GaussianProcess(Cosine(claim.start, 2.0), path))


def exact_law(oracle: GaussianOracle, t: float) -> tuple[float, float]:
    """Mean and standard deviation of z at time t."""
    alpha, sigma = (float(c) for c in oracle.process.coefficients(torch.tensor(t, dtype=torch.float64)))
    return alpha * oracle.mean, math.hypot(alpha * oracle.std, sigma)


def test_every_sampler_is_listed() -> None:
    """Those of discrete chains and consistency models are measured against their own recorded trajectories."""
    classes = {getattr(sampling, n) for n in sampling.__all__ if isinstance(getattr(sampling, n), type)}
    samplers = {c for c in classes if issubclass(c, Sampler) and not c.__name__.startswith("Respaced")}
    samplers -= {Sampler, MultistepConsistency}
    assert samplers == {type(c.make(32)) for c in (*DETERMINISTIC.values(), *STOCHASTIC.values())}


@on_every_path(DETERMINISTIC)
def test_order_of_convergence(name: str, path: Path) -> None:
    claim = DETERMINISTIC[name]
    oracle = oracle_of(claim, path)
    mean, std = exact_law(oracle, 1.0)
    xi = torch.tensor([-1.7, -0.6, 0.2, 1.1, 2.3], dtype=torch.float64).reshape(5, 1, 1, 1)
    z = mean + std * xi
    steps, errors = [], []
    for n in claim.steps:
        sampler = claim.make(n)
        end = float(sampler.times(oracle.process)[-1])
        got = integrate(oracle, sampler, z, Replay(z[:0]))
        steps.append(sampler.steps)
        errors.append(float((got - oracle.solution(z, 1.0, end)).abs().max()))
    assert abs(slope(steps, errors) - claim.order) < 0.15, f"errors {errors}"


class UnitNoise:
    """Draw k is the unit vector of row k + 2 of the batch: row 0 gets none, row 1 has a start of one."""

    def __init__(self, rows: int):
        self.rows, self.draws = rows, 0

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        noise = torch.zeros(self.rows, *shape, dtype=torch.float64)
        noise[2 + self.draws] = 1
        self.draws += 1
        return noise


def exact_moments(oracle: GaussianOracle, sampler: Sampler) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler returns, from the exact law at its start."""
    rows = 2 * sampler.steps + 2  # some draw twice a step
    z = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
    z[1] = 1
    out = integrate(oracle, sampler, z, UnitNoise(rows)).flatten()
    gains = out[1:] - out[0]
    mean, std = exact_law(oracle, 1.0)
    return float(out[0] + gains[0] * mean), float(((gains[0] * std) ** 2 + gains[1:].square().sum()).sqrt())


@on_every_path(STOCHASTIC)
def test_weak_order_of_convergence(name: str, path: Path) -> None:
    claim = STOCHASTIC[name]
    oracle = oracle_of(claim, path)
    want_mean, want_std = exact_law(oracle, 0.0)
    errors = []
    for n in claim.steps:
        mean, std = exact_moments(oracle, claim.make(n))
        errors.append(abs(std - want_std))
        assert abs(mean - want_mean) < 0.5 * want_mean / n + 1e-3 * want_mean
    assert abs(slope(list(claim.steps), errors) - claim.order) < 0.15, f"errors {errors}"


@pytest.mark.parametrize("name", [n for n, claim in (DETERMINISTIC | STOCHASTIC).items() if claim.start == -12.0])
def test_paths_give_the_same_images(name: str) -> None:
    """Samplers that know log-SNR, alpha and sigma alone: z on two paths differs by the paths' own factor."""
    claim, results = (DETERMINISTIC | STOCHASTIC)[name], []
    unit = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    draws = torch.randn(32, 4, 1, 2, 2, dtype=torch.float64)
    for path in PATHS.values():
        oracle = oracle_of(claim, path)
        (a, s), (a_end, _) = (oracle.process.coefficients(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0))
        z = unit * (a**2 + s**2).sqrt()
        results.append(integrate(oracle, claim.make(12), z, Replay(draws)) / a_end)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-7, atol=1e-9)


class ConsistencyOracle(GaussianOracle):
    """The exact consistency function: the ODE's solution at the data end."""

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        alpha = float(self.process.coefficients(torch.zeros((), dtype=torch.float64))[0])
        x = self.solution(z, float(t), 0.0) / alpha
        return super().__call__(z, t)._replace(x=x)


@pytest.mark.parametrize("stops", [(0,), (0, 22), (0, 9, 22, 31)])
def test_an_exact_consistency_function_keeps_the_law_in_any_number_of_steps(stops: tuple[int, ...]) -> None:
    oracle = ConsistencyOracle(GaussianProcess(LinearLogSNR(), data_scale=0.5))
    sampler = MultistepConsistency(len(stops), KarrasStops(stops=stops), clip=None)
    mean, std = exact_moments(oracle, sampler)
    assert mean == pytest.approx(oracle.mean, rel=1e-9)
    assert std == pytest.approx(math.hypot(oracle.std, 0.002), rel=1e-9)
