"""Every sampler with a public counterpart against diffusers, on an analytic mixture of Gaussians.

The mixture's exact denoiser stands for the network on both sides, and both walk over the same noise levels with the
same draws, so whole trajectories must agree to the float32 rounding of their tables of sigmas. Where the public code
does something else, a test says what.

    schedulers on alpha x + sigma eps    called with the step n = 0..999 of the table, which is t = (n + 1) / 1000
    schedulers on x + sigma eps          called with sigma; their state is z / alpha
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles import MixtureOracle, Replay
from torch import Tensor

from diffzoo.process import DiscreteBetas, Eps, Flow, GaussianProcess, LinearTime, Straight
from diffzoo.sampling import (
    DDIM,
    DEIS,
    DPM2,
    LMS,
    Ancestral,
    DPMSolver,
    DPMSolverMultistep,
    DPMSolverSDE,
    EDMEuler,
    Euler,
    Given,
    Heun,
    Karras,
    Sampler,
    UniformLogSNR,
    UniPC,
    integrate,
)
from diffzoo.sampling.exponential import frame

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESS = GaussianProcess(DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012), prediction=Eps())
COUNT = 38  # noise levels: 999 / 37 is whole, so linspace hits steps of the table
SHAPE = (6, 1, 2, 2)


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def mixture(process: GaussianProcess = PROCESS) -> MixtureOracle:
    means = torch.tensor([[1.0, 1.0, 0.5, -0.5], [-1.0, 0.5, -1.0, 0.0], [0.0, -1.5, 0.5, 1.5]])
    return MixtureOracle(process, torch.tensor([0.5, 0.3, 0.2]), means, torch.tensor([0.3, 0.2, 0.4]))


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(diffusers: Any, name: str, **options: Any) -> Any:
    scheduler = getattr(diffusers, name)(**BETAS | options)
    scheduler.set_timesteps(COUNT)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()  # their values are float32; differences of them need not be
    return scheduler


# -- schedulers on alpha x + sigma eps


def walk(scheduler: Any, z: Tensor, draws: Tensor | None = None, steps: int = COUNT - 1, **options: Any) -> Tensor:
    """Their state at the last noise level above zero."""
    noise: Iterator[Tensor] = iter(draws if draws is not None else ())
    for n in scheduler.timesteps[:steps]:
        if draws is not None:
            options["variance_noise"] = next(noise)
        eps = mixture()(z, (n.double() + 1) / 1000).eps
        z = scheduler.step(eps, n, z, return_dict=False, **options)[0]
    return z


def on_their_times(scheduler: Any) -> Given:
    return Given(values=((scheduler.timesteps.double() + 1) / 1000).tolist())


MULTISTEP = {"timestep_spacing": "linspace", "lower_order_final": False, "final_sigmas_type": "zero"}
MultistepCase = tuple[str, dict[str, Any], Callable[[int, Any], Sampler]]
CASES: dict[str, MultistepCase] = {
    f"{name} ({order})": (scheduler, options | {"solver_order": order}, lambda n, g, o=order, c=cls, a=arguments: c(
        n, g, order=o, final="state", lower_order_final=False, **a
    ))
    for name, scheduler, options, cls, arguments, orders in (
        ("DPM-Solver++", "DPMSolverMultistepScheduler", MULTISTEP, DPMSolverMultistep, {}, (1, 2)),
        (
            "DPM-Solver",
            "DPMSolverMultistepScheduler",
            MULTISTEP | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            DPMSolverMultistep,
            {"form": "noise"},
            (1, 2),
        ),
        ("DEIS", "DEISMultistepScheduler", {"lower_order_final": False}, DEIS, {}, (1, 2, 3)),
        ("UniPC", "UniPCMultistepScheduler", {"lower_order_final": False}, UniPC, {}, (1, 2, 3)),
        (
            "UniPC, noise",
            "UniPCMultistepScheduler",
            {"lower_order_final": False, "predict_x0": False},
            UniPC,
            {"form": "noise"},
            (1, 2, 3),
        ),
    )
    for order in orders
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_multistep(diffusers: Any, name: str) -> None:
    scheduler_name, options, make = CASES[name]
    scheduler = made(diffusers, scheduler_name, **options)
    z = normals(*SHAPE)
    got = integrate(mixture(), make(COUNT - 1, on_their_times(scheduler)), z, Replay(z[:0]))
    torch.testing.assert_close(got, walk(scheduler, z), rtol=0, atol=1e-5)


def test_short_runs_lower_their_order_alike(diffusers: Any) -> None:
    """Ten noise levels, to the data: the last steps but one and two have order 1 and 2 on both sides."""
    for scheduler_name, cls in (
        ("DPMSolverMultistepScheduler", DPMSolverMultistep),
        ("UniPCMultistepScheduler", UniPC),
    ):
        order = 2 if cls is DPMSolverMultistep else 3
        scheduler = made(diffusers, scheduler_name, solver_order=order)
        scheduler.set_timesteps(10)
        times = (scheduler.timesteps.double() + 1) / 1000
        z = normals(*SHAPE)
        sampler = cls(10, Given(values=[*times.tolist(), 0.0]), order=order)
        got = integrate(mixture(), sampler, z, Replay(z[:0]))
        torch.testing.assert_close(got, walk(scheduler, z, steps=10), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_multistep(diffusers: Any, order: int) -> None:
    options = MULTISTEP | {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
    scheduler = made(diffusers, "DPMSolverMultistepScheduler", **options)
    z, draws = normals(*SHAPE), normals(COUNT, *SHAPE, seed=1)
    sampler = DPMSolverMultistep(
        COUNT - 1, on_their_times(scheduler), order=order, eta=1.0, final="state", lower_order_final=False
    )
    got = integrate(mixture(), sampler, z, Replay(draws))
    torch.testing.assert_close(got, walk(scheduler, z, draws), rtol=0, atol=1e-5)


class PublicThirdOrder(DPMSolverMultistep):
    """Third order with the public weight of the parabola's last coefficient; ours is that of its integral."""

    def step(self, denoise: Any, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Any) -> tuple[Tensor, Any]:
        out, past = super().step(denoise, z, t, s, memory, noise)
        if len(past.calls) == 3:
            end = frame(denoise.process, s, "data")
            u, m = [c.at.u for c in past.calls], [c.estimate for c in past.calls]
            step = end.u - u[0]
            h = (1 + self.eta**2) * step
            slopes = (m[0] - m[1]) / (u[0] - u[1]), (m[1] - m[2]) / (u[1] - u[2])
            last = step**2 * (slopes[0] - slopes[1]) / (u[0] - u[2])
            exact = 1 - 2 / h * (1 + torch.expm1(-h) / h)
            # half of it; and the stochastic variant, besides, has - 1/2 in diffusers where + 1/2 belongs
            public = exact / 2 - (1 if self.eta else 0)
            out = out + (public - exact) * end.signal * last
        return out, past


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_third_order_is_exact_here_and_not_in_public(diffusers: Any, algorithm: str) -> None:
    """Public code takes half of the second derivative, which converges with order 2; see `PublicThirdOrder`."""
    eta = float(algorithm.startswith("sde"))
    scheduler = made(
        diffusers, "DPMSolverMultistepScheduler", **MULTISTEP | {"algorithm_type": algorithm, "solver_order": 3}
    )
    z, draws = normals(*SHAPE), normals(COUNT, *SHAPE, seed=1)
    sampler = PublicThirdOrder(
        COUNT - 1, on_their_times(scheduler), order=3, eta=eta, final="state", lower_order_final=False
    )
    got = integrate(mixture(), sampler, z, Replay(draws))
    torch.testing.assert_close(got, walk(scheduler, z, draws if eta else None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("algorithm", "form"), [("dpmsolver++", "data"), ("dpmsolver", "noise")])
def test_singlestep(diffusers: Any, order: int, algorithm: str, form: Any) -> None:
    final = {"final_sigmas_type": "sigma_min"} if form == "noise" else {}
    scheduler = made(
        diffusers, "DPMSolverSinglestepScheduler", solver_order=order, algorithm_type=algorithm,
        lower_order_final=False, **final,
    )  # fmt: skip
    steps = (COUNT - 1) // order * order
    times = on_their_times(scheduler).values[: steps + 1]
    z = normals(*SHAPE)
    sampler = DPMSolver(steps, Given(values=times), order=order, method="singlestep", form=form)
    got = integrate(mixture(), sampler, z, Replay(z[:0]))
    torch.testing.assert_close(got, walk(scheduler, z, steps=steps), rtol=0, atol=1e-5)


def test_third_order_singlestep_has_another_second_node(diffusers: Any) -> None:
    """Public code reaches the second inner node by the midpoint form of order 2 instead of the paper's."""
    scheduler = made(diffusers, "DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=False)
    z = normals(*SHAPE)
    times = on_their_times(scheduler).values
    first = integrate(mixture(), DDIM(1, Given(values=times[:2]), final="state"), z, Replay(z[:0]))
    torch.testing.assert_close(walk(scheduler, z, steps=1), first, rtol=0, atol=1e-5)
    scheduler.set_timesteps(COUNT)
    sampler = DPMSolver(3, Given(values=times[:4]), order=3, method="singlestep")
    got = integrate(mixture(), sampler, z, Replay(z[:0]))
    assert 1e-7 < float((got - walk(scheduler, z, steps=3)).abs().max()) < 1e-2


# -- chains


def test_ddim(diffusers: Any) -> None:
    scheduler = made(diffusers, "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(50)  # indices 980, 960, ..., 0; the last goes to index 0, which changes nothing
    z, draws = normals(*SHAPE), normals(50, *SHAPE, seed=1)
    grid = on_their_times(scheduler)
    got = integrate(mixture(), DDIM(49, grid, final="state"), z, Replay(z[:0]))
    torch.testing.assert_close(got, walk(scheduler, z, steps=49), rtol=0, atol=1e-5)
    scheduler.set_timesteps(50)
    theirs = walk(scheduler, z, draws, steps=49, eta=0.6)
    torch.testing.assert_close(
        integrate(mixture(), DDIM(49, grid, eta=0.6, final="state"), z, Replay(draws)), theirs, rtol=0, atol=1e-5
    )


def test_ddim_with_linspace_steps_beside_its_grid(diffusers: Any) -> None:
    """Public code steps from n to n - T // S, which is not the next step of a linspace grid: 26 instead of 27."""
    scheduler = made(diffusers, "DDIMScheduler", clip_sample=False, timestep_spacing="linspace")
    first, second = (int(n) for n in scheduler.timesteps[:2])
    assert first - second == 27
    z = normals(*SHAPE)

    def ours(end: int) -> Tensor:
        grid = Given(values=[1.0, (end + 1) / 1000])
        return integrate(mixture(), DDIM(1, grid, final="state"), z, Replay(z[:0]))

    theirs = walk(scheduler, z, steps=1)
    torch.testing.assert_close(theirs, ours(first - 1000 // COUNT), rtol=0, atol=1e-5)
    assert float((theirs - ours(second)).abs().max()) > 1e-4


def test_ddpm_is_ancestral_sampling(diffusers: Any) -> None:
    scheduler = made(diffusers, "DDPMScheduler", clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    z = normals(*SHAPE)
    generator = torch.Generator().manual_seed(3)
    theirs = walk(scheduler, z, steps=49, generator=generator)
    generator.manual_seed(3)
    draws = torch.stack([torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(49)])
    ours = integrate(mixture(), Ancestral(49, on_their_times(scheduler), gamma=0.0, final="state"), z, Replay(draws))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# -- schedulers on x + sigma eps


def walk_sigmas(scheduler: Any, z: Tensor, calls: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Their state z / alpha after some network calls, and the noise levels of all calls."""
    oracle, seen = mixture(), []
    y = z / PROCESS.coefficients(time_of(scheduler.sigmas[0]))[0]
    for n in scheduler.timesteps[:calls]:
        scheduler.scale_model_input(y, n)
        hat = y
        sigma = scheduler.sigmas[scheduler.step_index]
        inner = getattr(scheduler, "sigmas_interpol", None)
        if inner is not None and not scheduler.state_in_first_order:
            sigma = inner[scheduler.step_index]
        elif getattr(scheduler, "mid_point_sigma", None) is not None:
            sigma = scheduler.mid_point_sigma
        seen.append(float(sigma))
        t = time_of(sigma)
        eps = oracle(PROCESS.coefficients(t)[0] * hat, t).eps
        y = scheduler.step(eps, n, y, return_dict=False, **options)[0].double()
    return y, torch.tensor(seen, dtype=torch.float64)


def time_of(sigma: Any) -> Tensor:
    return PROCESS.schedule.time(-2 * torch.as_tensor(sigma, dtype=torch.float64).log())


def end_of(sampler: Sampler, z: Tensor, draws: Tensor) -> Tensor:
    """Our state z / alpha at the end of the sampler's grid."""
    got = integrate(mixture(), sampler, z, Replay(draws))
    return got / PROCESS.coefficients(sampler.times(PROCESS)[-1])[0]


SIGMA_CASES: dict[str, tuple[str, int, Callable[[int, Any], Sampler]]] = {
    "Euler": ("EulerDiscreteScheduler", 1, lambda n, g: EDMEuler(n, g, final="state")),
    "Euler as DDIM": ("EulerDiscreteScheduler", 1, lambda n, g: DDIM(n, g, final="state")),
    "Heun": ("HeunDiscreteScheduler", 2, lambda n, g: Heun(n, g, final="state")),
    "LMS": ("LMSDiscreteScheduler", 1, lambda n, g: LMS(n, g, final="state")),
    "DPM2": ("KDPM2DiscreteScheduler", 2, lambda n, g: DPM2(n, g, final="state")),
}


@pytest.mark.parametrize("name", SIGMA_CASES)
@pytest.mark.parametrize("spacing", ["linspace", "use_karras_sigmas", "use_exponential_sigmas"])
def test_deterministic_in_sigma(diffusers: Any, name: str, spacing: str) -> None:
    scheduler_name, calls, make = SIGMA_CASES[name]
    options = {spacing: True} if spacing != "linspace" else {"timestep_spacing": "linspace"}
    scheduler = made(diffusers, scheduler_name, **options)
    z = normals(*SHAPE)
    theirs, _ = walk_sigmas(scheduler, z, calls * (COUNT - 1))
    sigmas = scheduler.sigmas.double().unique_consecutive()[:COUNT]
    ours = end_of(make(COUNT - 1, Given(values=sigmas.tolist(), unit="sigma")), z, z[:0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if spacing != "linspace":
        grid = Karras if spacing == "use_karras_sigmas" else UniformLogSNR
        times = grid.for_sigmas(PROCESS, float(sigmas[-1]), float(sigmas[0])).times(PROCESS, COUNT - 1)
        torch.testing.assert_close(torch.exp(-PROCESS.logsnr(times) / 2), sigmas, rtol=1e-5, atol=0)


def generated(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)])


def test_ancestral_euler_is_ddim_with_eta_one(diffusers: Any) -> None:
    scheduler = made(diffusers, "EulerAncestralDiscreteScheduler", timestep_spacing="linspace")
    z = normals(*SHAPE)
    theirs, sigmas = walk_sigmas(scheduler, z, COUNT - 1, generator=torch.Generator().manual_seed(5))
    grid = Given(values=[*sigmas.tolist(), float(scheduler.sigmas[COUNT - 1])], unit="sigma")
    ours = end_of(DDIM(COUNT - 1, grid, eta=1.0, final="state"), z, generated(5, COUNT))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_stochastic_dpm_solver(diffusers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Brownian motion in sigma is given our draws: one for each half of a step."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))  # which would make the Brownian motion
    public = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler = made(public, "DPMSolverSDEScheduler", timestep_spacing="linspace")
    z, draws = normals(*SHAPE), normals(2 * COUNT, *SHAPE, seed=2)
    sigmas = scheduler.sigmas.double().unique_consecutive()[:COUNT]

    def increment(start: Tensor, end: Tensor) -> Tensor:
        i = int((sigmas - float(start)).abs().argmin())
        whole, part = float(sigmas[i] - sigmas[i + 1]), float(start) - float(end)
        first = float(sigmas[i] - (sigmas[i] * sigmas[i + 1]).sqrt())
        if part < 0.999 * whole:
            return draws[2 * i]
        return ((first / whole) ** 0.5) * draws[2 * i] + ((1 - first / whole) ** 0.5) * draws[2 * i + 1]

    scheduler.noise_sampler = increment
    theirs, _ = walk_sigmas(scheduler, z, 2 * (COUNT - 1))
    sampler = DPMSolverSDE(COUNT - 1, Given(values=sigmas.tolist(), unit="sigma"), final="state")
    torch.testing.assert_close(end_of(sampler, z, draws), theirs, rtol=0, atol=1e-5)


# -- flow matching


def test_flow_matching(diffusers: Any) -> None:
    """Their first sigma is 1, where our schedule ends next to it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    process = GaussianProcess(LinearTime(-60, 60), Straight(), Flow())
    oracle, z = mixture(process), normals(*SHAPE)
    times = scheduler.sigmas.double().tolist()
    ours = integrate(oracle, Euler(20, Given(values=times), final="state"), z, Replay(z[:0]))
    for n, t in zip(scheduler.timesteps, times, strict=False):
        estimate = oracle(z, torch.tensor(t, dtype=torch.float64))
        z = scheduler.step(estimate.eps - estimate.x, n, z, return_dict=False)[0].double()
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-5)
