"""Single steps against formulas written out, from YAML; mistakes. `tests/parity` has other libraries."""

import math

import pytest
import torch
from oracles import GaussianOracle, Replay

from diffzoo.errors import UserError
from diffzoo.process import Cosine, DiscreteBetas, Eps, Flow, GaussianProcess, LinearTime, Straight, VarianceExploding
from diffzoo.sampling import (
    DDIM,
    DEIS,
    LMS,
    AdjustedDDIM,
    Ancestral,
    DPMSolver,
    DPMSolverMultistep,
    DPMSolverSDE,
    Euler,
    EulerMaruyama,
    Heun,
    Karras,
    Sampler,
    UniformLogSNR,
    UniformTime,
    UniPC,
    integrate,
)

PROCESS = GaussianProcess(Cosine(-9, 9))
STABLE_DIFFUSION = GaussianProcess(DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012), prediction=Eps())


class Bound:
    """An oracle as a step sees it."""

    def __init__(self, oracle: GaussianOracle):
        self.oracle, self.process = oracle, oracle.process

    def __call__(self, z, t):  # type: ignore[no-untyped-def]
        return self.oracle(z, t)


def step_of(sampler: Sampler, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    oracle = GaussianOracle(PROCESS)
    z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    t, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.45, dtype=torch.float64)
    draws = torch.zeros(0) if noise is None else noise[None]
    out, _ = sampler.step(Bound(oracle), z, t, s, None, Replay(draws))
    (a_t, s_t), (a_s, s_s) = PROCESS.coefficients(t), PROCESS.coefficients(s)
    return out, z, oracle(z, t).x, a_t, s_t, a_s, s_s


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_ancestral_step_of_simple_diffusion(gamma: float) -> None:
    """Mean and interpolated log-variance as printed in the appendix of arXiv:2301.11093."""
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    out, z, x, a_t, s_t, a_s, s_s = step_of(Ancestral(gamma=gamma), noise)
    ratio = a_t**2 * s_s**2 / (s_t**2 * a_s**2)
    mean = ratio * (a_s / a_t) * z + (1 - ratio) * a_s * x
    log_variance = gamma * math.log((1 - ratio) * s_t**2) + (1 - gamma) * math.log((1 - ratio) * s_s**2)
    torch.testing.assert_close(out, mean + math.exp(log_variance / 2) * noise)


def test_posterior_of_ancestral_is_the_gaussian_product() -> None:
    """gamma 0 is Bayes' rule for z_s given z_t and x, by completing the square."""
    out, z, x, a_t, s_t, a_s, s_s = step_of(Ancestral(gamma=0.0), torch.zeros(3, 1, 2, 2, dtype=torch.float64))
    a_ts = a_t / a_s
    precision = a_ts**2 / (s_t**2 - a_ts**2 * s_s**2) + 1 / s_s**2
    mean = (a_ts * z / (s_t**2 - a_ts**2 * s_s**2) + a_s * x / s_s**2) / precision
    torch.testing.assert_close(out, mean)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step(eta: float) -> None:
    """Eq. 12 and 16 of arXiv:2010.02502."""
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    out, z, x, a_t, s_t, a_s, s_s = step_of(DDIM(eta=eta), noise)
    deviation = eta * (s_s / s_t) * (1 - (a_t / a_s) ** 2).sqrt()
    eps = (z - a_t * x) / s_t
    torch.testing.assert_close(out, a_s * x + (s_s**2 - deviation**2).sqrt() * eps + deviation * noise)


def test_ddim_with_eta_one_is_ancestral_with_gamma_zero() -> None:
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(step_of(DDIM(eta=1.0), noise)[0], step_of(Ancestral(gamma=0.0), noise)[0])


def test_first_order_methods_are_all_ddim() -> None:
    want = step_of(DDIM())[0]
    for sampler in (
        DPMSolverMultistep(order=1),
        DPMSolverMultistep(order=1, form="noise"),
        DPMSolver(order=1, method="singlestep"),
        AdjustedDDIM(strength=0.0),
    ):
        torch.testing.assert_close(step_of(sampler)[0], want)


def test_euler_on_flow_matching_is_ddim_and_follows_the_velocity() -> None:
    oracle = GaussianOracle(GaussianProcess(LinearTime(-30, 30), Straight()))
    z = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    t, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.45, dtype=torch.float64)
    estimate = oracle(z, t)
    euler, _ = Euler().step(Bound(oracle), z, t, s, None, Replay(z[:0]))
    ddim, _ = DDIM().step(Bound(oracle), z, t, s, None, Replay(z[:0]))
    torch.testing.assert_close(euler, ddim)
    torch.testing.assert_close(euler, z + (s - t) * (estimate.eps - estimate.x), rtol=1e-5, atol=1e-5)
    quiet, _ = EulerMaruyama(strength=0.0).step(Bound(oracle), z, t, s, None, Replay(z[None]))
    torch.testing.assert_close(quiet, euler)


def test_euler_from_the_end_of_flow_matching() -> None:
    """Beyond a log-SNR of -74 sigma is 1 to the last bit, though alpha is not 0."""
    oracle = GaussianOracle(GaussianProcess(LinearTime(-200, 200), Straight(), Flow()))
    z = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    end = integrate(oracle, Euler(400, UniformTime(), final="state"), z, Replay(z[:0]))
    torch.testing.assert_close(end, oracle.solution(z, 1.0, 0.0), rtol=0, atol=0.02)


def test_heun_averages_two_slopes() -> None:
    out, z, x, a_t, s_t, a_s, s_s = step_of(Heun())
    h = s_s / a_s - s_t / a_t
    first = (z - a_t * x) / s_t
    guess = a_s * (z / a_t + h * first)
    s = torch.tensor(0.45, dtype=torch.float64)
    second = (guess - a_s * GaussianOracle(PROCESS)(guess, s).x) / s_s
    torch.testing.assert_close(out, a_s * (z / a_t + h * (first + second) / 2))


def test_churn_adds_the_noise_of_the_later_time() -> None:
    """sigma_hat = sigma (1 + gamma), gamma = min(churn / N, sqrt 2 - 1), only between the limits.

    N counts the last step, to zero noise: with final "denoise" it is one more than `steps`.
    """
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    out, z, _, a_t, s_t, *_ = step_of(Heun(steps=9, churn=2.0), noise)
    torch.testing.assert_close(out, step_of(Heun(steps=10, churn=2.0, final="x_hat"), noise)[0])
    r = s_t / a_t
    later = PROCESS.schedule.time(-2 * torch.log(1.2 * r))
    a_hat, _ = PROCESS.coefficients(later)
    z_hat = a_hat * (z / a_t + ((1.2 * r) ** 2 - r**2).sqrt() * noise)
    s = torch.tensor(0.45, dtype=torch.float64)
    want, _ = Heun().step(Bound(GaussianOracle(PROCESS)), z_hat, later, s, None, Replay(z[:0]))
    torch.testing.assert_close(out, want)
    for limits in ({"churn_min": 2 * float(r)}, {"churn_max": 0.5 * float(r)}):
        torch.testing.assert_close(step_of(Heun(steps=9, churn=2.0, **limits))[0], step_of(Heun())[0])


def edm_heun(
    oracle: GaussianOracle, sigmas: list[float], z: torch.Tensor, churn: float, draws: torch.Tensor
) -> torch.Tensor:
    """Algorithm 2 of arXiv:2206.00364 line by line, where sigma = t and the last sigma is 0."""
    x, n = z, len(sigmas) - 1
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1)
        t_hat = sigmas[i] + gamma * sigmas[i]
        x_hat = x + math.sqrt(t_hat**2 - sigmas[i] ** 2) * draws[i]

        def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
            t = oracle.process.schedule.time(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))
            return (x - oracle(x, t).x) / sigma

        d = slope(x_hat, t_hat)
        x = x_hat + (sigmas[i + 1] - t_hat) * d
        if sigmas[i + 1] > 0:
            x = x_hat + (sigmas[i + 1] - t_hat) * (d + slope(x, sigmas[i + 1])) / 2
    return x


@pytest.mark.parametrize("churn", [0.0, 5.0, 100.0])
def test_heun_is_algorithm_2_of_edm(churn: float) -> None:
    oracle = GaussianOracle(GaussianProcess(Cosine(-18, 15), VarianceExploding()))
    grid = Karras.for_sigmas(oracle.process)
    draws = torch.randn(32, 3, 1, 2, 2, dtype=torch.float64)
    z = 80 * torch.randn(3, 1, 2, 2, dtype=torch.float64)
    sigmas = torch.exp(-oracle.process.logsnr(grid.times(oracle.process, 31)) / 2).tolist()
    got = integrate(oracle, Heun(31, grid, churn=churn), z, Replay(draws))
    torch.testing.assert_close(got, edm_heun(oracle, [*sigmas, 0.0], z, churn, draws), rtol=0, atol=1e-10)


# -- multistep


def test_order_falls_at_the_end_of_short_runs() -> None:
    """A linear grid that ends at the data: a parabola through the past leaves the solution at the last, long steps."""
    oracle = GaussianOracle(GaussianProcess(Cosine(-15, 15)))
    z = torch.randn(16, 1, 2, 2, dtype=torch.float64)

    def error(**options: object) -> float:
        sampler = DPMSolverMultistep(10, UniformTime(), final="state", **options)  # type: ignore[arg-type]
        return float((integrate(oracle, sampler, z, Replay(z[:0])) - oracle.solution(z, 1.0, 0.0)).abs().max())

    assert error(order=3) < 0.1 < 1 < error(order=3, lower_order_final=False)
    assert error(order=2, lower_order_final=False, euler_at_final=True) == pytest.approx(error(order=2))
    assert [DPMSolverMultistep(10, order=3).order_at(i) for i in (0, 7, 8, 9)] == [3, 3, 2, 1]
    assert [UniPC(15, order=3).order_at(i) for i in (0, 13, 14)] == [3, 3, 3]
    assert [DEIS(15, euler_at_final=True).order_at(i) for i in (0, 13, 14)] == [3, 3, 1]


# -- DPM-Solver's groups


@pytest.mark.parametrize(
    ("steps", "orders"),
    [
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
        (4, [3, 1]),
        (5, [3, 2]),
        (6, [3, 2, 1]),
        (10, [3, 3, 3, 1]),
        (12, [3, 3, 3, 2, 1]),
    ],
)
def test_fast_groups(steps: int, orders: list[int]) -> None:
    assert DPMSolver(steps).orders == orders
    assert sum(DPMSolver(steps).orders) == steps


def test_inner_nodes_divide_each_group_evenly_in_logsnr() -> None:
    solver = DPMSolver(10, UniformTime(1.0, 1e-2), inner="logsnr")
    times = solver.times(PROCESS)
    assert len(times) == 11
    torch.testing.assert_close(times[[0, 3, 6, 9, 10]], UniformTime(1.0, 1e-2).times(PROCESS, 4))
    logsnr = PROCESS.logsnr(times)
    for start in (0, 3, 6):
        steps = logsnr[start : start + 4].diff()
        torch.testing.assert_close(steps, steps.mean().expand(3))


# -- YAML


YAML = [
    ("DDIM", {"steps": 20, "eta": 0.5}, DDIM(20, eta=0.5)),
    ("Ancestral", {"gamma": 1.0, "clip": 1.0}, Ancestral(gamma=1.0, clip=1.0)),
    (
        "DPMSolver",
        {"grid": {"class_path": "diffzoo.sampling.UniformLogSNR", "init_args": {"t_end": 1e-4}}, "inner": "logsnr"},
        DPMSolver(grid=UniformLogSNR(t_end=1e-4), inner="logsnr"),
    ),
    ("DPMSolverMultistep", {"order": 3}, DPMSolverMultistep(order=3)),
    ("Heun", {"grid": {"class_path": "diffzoo.sampling.Karras"}, "churn": 40}, Heun(grid=Karras(), churn=40.0)),
    ("AdjustedDDIM", {}, AdjustedDDIM()),
    ("Euler", {"final": "state"}, Euler(final="state")),
    ("EulerMaruyama", {"diffusion": "sigma"}, EulerMaruyama(diffusion="sigma")),
]


@pytest.mark.parametrize(("name", "arguments", "want"), YAML, ids=[y[0] for y in YAML])
def test_from_yaml(name: str, arguments: dict, want: Sampler) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampler", type=Sampler)
    config = {"sampler": {"class_path": f"diffzoo.sampling.{name}", "init_args": arguments}}
    assert parser.instantiate(parser.parse_object(config)).sampler == want
    wrong = {"sampler": {"class_path": f"diffzoo.sampling.{name}", "init_args": {"stepz": 3}}}
    with pytest.raises(Exception, match="stepz"):
        parser.parse_object(wrong)


# -- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM(0), "at least 1 step, got 0"),
        (lambda: DDIM(clip=-1.0), "clip must be positive"),
        (lambda: DDIM(final="z"), "got 'z'"),
        (lambda: DDIM(eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: Ancestral(gamma=-0.1), r"gamma must lie in \[0, 1\]"),
        (lambda: AdjustedDDIM(prior_variance=0.0), "prior_variance > 0"),
        (lambda: DPMSolver(order=4, method="singlestep"), "order to be one of 1, 2, 3, got 4"),
        (lambda: DPMSolver(order=2), "use method 'singlestep'"),
        (lambda: DPMSolver(2, order=3, method="singlestep"), "at least 3 steps"),
        (lambda: DPMSolver(method="slow"), "got 'slow'"),
        (lambda: DPMSolver(inner="t"), "got 't'"),
        (lambda: DPMSolver(form="v"), "got 'v'"),
        (lambda: DPMSolverMultistep(eta=1.0, form="noise"), "needs form 'data'"),
        (lambda: UniPC(order=4), "order to be one of 1, 2, 3, got 4"),
        (lambda: LMS(order=5), "orders 1 to 4"),
        (lambda: DPMSolverSDE(eta=1.1), r"eta must lie in \[0, 1\]"),
        (lambda: DPMSolverMultistep(eta=2.0), r"eta must lie in \[0, 1\]"),
        (lambda: Heun(churn=-1), "churn >= 0"),
        (lambda: EulerMaruyama(diffusion="g"), "got 'g'"),
        (lambda: EulerMaruyama(strength=-1), "must not be negative"),
    ],
)
def test_bad_arguments(make: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()  # type: ignore[operator]
