"""Samplers on exact mixtures of Gaussians: component weights, moments within components, and agreement of solvers."""

import math
from collections.abc import Sequence

import pytest
import torch
from oracles import MixtureOracle, Replay
from process_parts import PATHS
from torch import Tensor

from diffzoo.process import Cosine, Estimate, GaussianProcess, LinearTime, Path, Shifted
from diffzoo.sampling import (
    DDIM,
    AdjustedDDIM,
    Ancestral,
    ClassifierFree,
    DPMSolver,
    DPMSolverMultistep,
    Euler,
    EulerMaruyama,
    Heun,
    Sampler,
    UniformLogSNR,
    UniformTime,
    integrate,
    sample,
)
from diffzoo.typing import Condition

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[1.0, 1.0, 0.5, -0.5], [-1.0, 0.5, -1.0, 0.0], [0.0, -1.5, 0.5, 1.5]])
STDS = torch.tensor([0.3, 0.2, 0.4])
SHAPE = (1, 2, 2)
COUNT = 3000
CLEAN = UniformLogSNR()


def mixture(path: Path = PATHS["preserving"], schedule: object = None) -> MixtureOracle:
    return MixtureOracle(GaussianProcess(schedule or Cosine(-12, 12), path), WEIGHTS, MEANS, STDS)


class SharedNoise:
    """Draws for the whole batch at once: the law does not ask which image got which, and this is faster."""

    def __init__(self, count: int):
        self.count = count
        self.generator = torch.Generator().manual_seed(7)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)


def draw(oracle: MixtureOracle, sampler: Sampler, count: int = COUNT) -> Tensor:
    """Images from the start of the sampler's grid."""
    noise = SharedNoise(count)
    side = math.isqrt(oracle.means.shape[1])
    return integrate(oracle, sampler, noise.normal((1, side, side)), noise)


def check_law(oracle: MixtureOracle, x: Tensor, slack: float) -> None:
    """Weights within four standard errors; means and standard deviations of components within `slack`."""
    component, n = oracle.component(x), len(x)
    for k, w in enumerate(WEIGHTS.tolist()):
        mine = x[component == k].flatten(1)
        assert abs(len(mine) / n - w) < 4 * math.sqrt(w * (1 - w) / n), f"weight of component {k}: {len(mine) / n}"
        torch.testing.assert_close(mine.mean(0), MEANS[k], rtol=0, atol=slack)
        assert abs(float((mine - MEANS[k]).square().mean().sqrt()) / float(STDS[k]) - 1) < slack + 0.03


SAMPLERS: dict[str, tuple[Sampler, float]] = {
    "ancestral": (Ancestral(160, CLEAN), 0.06),
    "ancestral in t": (Ancestral(160), 0.06),
    "DDIM": (DDIM(100, CLEAN), 0.06),
    "DDIM, eta 1": (DDIM(160, CLEAN, eta=1.0), 0.07),
    "aDDIM": (AdjustedDDIM(100, CLEAN), 0.06),
    "2M": (DPMSolverMultistep(30), 0.06),
    "3M": (DPMSolverMultistep(30, order=3), 0.06),
    "SDE 2M": (DPMSolverMultistep(50, eta=1.0), 0.06),
    "fast": (DPMSolver(40, CLEAN), 0.06),
    "Heun": (Heun(30), 0.06),
    "Heun with churn": (Heun(40, churn=10.0), 0.06),
    "Euler": (Euler(150, UniformTime()), 0.06),
    "Euler-Maruyama, D = sigma / 2": (EulerMaruyama(200, UniformTime(), diffusion="sigma"), 0.07),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_law_of_the_images(name: str) -> None:
    sampler, slack = SAMPLERS[name]
    # the straight path with its own schedule, for the methods in t too
    flow = isinstance(sampler, Euler | EulerMaruyama)
    oracle = mixture(PATHS["straight"], LinearTime(-12, 12)) if flow else mixture()
    check_law(oracle, draw(oracle, sampler), slack)


def test_the_check_can_fail() -> None:
    oracle = mixture()
    x = draw(oracle, DDIM(100, CLEAN))
    with pytest.raises(AssertionError):
        check_law(oracle, 1.1 * x, 0.06)
    with pytest.raises(AssertionError):
        check_law(oracle, draw(oracle, DDIM(4)), 0.06)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_solvers_agree_on_the_solution(path: Path) -> None:
    """No closed form here, but all deterministic solvers share one limit; high order gets there in few steps."""
    oracle = mixture(path)
    scale = (sum(c**2 for c in oracle.process.coefficients(torch.tensor(1.0, dtype=torch.float64)))) ** 0.5
    z = torch.randn(64, *SHAPE, dtype=torch.float64) * scale

    def end(sampler: Sampler) -> Tensor:
        return integrate(oracle, sampler, z, Replay(z[:0]))

    reference = end(DPMSolver(300, CLEAN, order=3, method="singlestep", inner="logsnr"))
    errors = {}
    for name, sampler in {
        "2M": DPMSolverMultistep(100, final="state"),
        "3M": DPMSolverMultistep(100, final="state", order=3),
        "Heun": Heun(100, final="state"),
        "DDIM": DDIM(100, CLEAN, final="state"),
    }.items():
        errors[name] = float((end(sampler) - reference).abs().mean())
    assert errors["3M"] < errors["2M"] < errors["DDIM"] / 5
    assert errors["Heun"] < errors["DDIM"] / 5
    assert errors["DDIM"] < 0.04


def test_shifted_schedules_and_conditions() -> None:
    """A label picks its component, and scale 0 of the first formula undoes it."""
    oracle = mixture(schedule=Shifted(Cosine(), 16, 32))
    cond = Condition(label=torch.full((400,), 1))
    x = sample(oracle, DPMSolverMultistep(25), SHAPE, range(400), cond)
    assert (oracle.component(x) == 1).all()
    free = sample(ClassifierFree(oracle, 0.0), DPMSolverMultistep(25), SHAPE, range(400), cond)
    share = torch.bincount(oracle.component(free), minlength=3) / 400
    torch.testing.assert_close(share, WEIGHTS, rtol=0, atol=0.1)


def test_adjusted_ddim_is_less_smooth_than_ddim() -> None:
    """Its purpose: at few steps the pixels' standard deviation is nearer to the data's."""
    oracle = MixtureOracle(GaussianProcess(Cosine(-12, 12)), torch.ones(1), torch.zeros(1, 64), torch.tensor([0.7]))
    spread = {kind: float(draw(oracle, kind(12, CLEAN)).std()) for kind in (DDIM, AdjustedDDIM)}
    assert spread[DDIM] + 0.005 < spread[AdjustedDDIM] < 0.7 + 0.03


def test_adjusted_ddim_adds_the_missing_norm() -> None:
    """Eq. 12-14 of arXiv:2403.06807: for x_hat orthogonal to eps_hat, |z|^2 grows by d Var[z_s | z_t]."""
    process = GaussianProcess(Cosine(-12, 12))
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    (a, b), (c, d) = process.coefficients(t), process.coefficients(s)
    x, eps = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64).unbind()
    overlap = (x * eps).sum((1, 2, 3), keepdim=True) / (x * x).sum((1, 2, 3), keepdim=True)
    eps = eps - overlap * x

    class Believes:
        def __init__(self) -> None:
            self.process = process

        def __call__(self, z: Tensor, t: Tensor) -> Estimate:
            return Estimate(x, eps)

    def squares(sampler: Sampler) -> Tensor:
        z, _ = sampler.step(Believes(), a * x + b * eps, t, s, None, SharedNoise(5))
        return z.square().sum((1, 2, 3))

    variance = (c - a * d / b) ** 2 * 0.1 / (2 + (a / b) ** 2)
    gain = squares(AdjustedDDIM()) - squares(DDIM())
    torch.testing.assert_close(gain, 64 * variance.expand(5))
