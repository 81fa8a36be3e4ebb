"""Noise schedules, time grids and solver trajectories of U-ViT's and DiMR's samplers, on exact Gaussian mixtures."""

from collections.abc import Callable
from pathlib import Path

import torch
from golden_case import Handler, Json, Tensors, assert_close, section
from oracles import MixtureOracle, Replay
from torch import Tensor

from diffzoo.process import (
    X0,
    DiscreteBetas,
    Eps,
    Estimate,
    GaussianProcess,
    LinearBeta,
    OffsetCosine,
    Prediction,
    Schedule,
    TimeConditioning,
)
from diffzoo.sampling import (
    ClassifierFree,
    Denoiser,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Grid,
    Moment,
    PowerTime,
    UniformLogSNR,
    UniformThenZero,
    UniformTime,
    integrate,
)
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.samplers import node
from diffzoo.typing import Condition

STABLE_DIFFUSION = DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012)

# -- schedules and grids


def run_schedules(case: Json, tensors: Tensors, folder: Path) -> None:
    want = section(tensors, "out/")
    groups = {name.split("/")[0] for name in want}
    assert groups <= schedule_groups.keys(), f"unknown groups {groups - schedule_groups.keys()}"
    for group in sorted(groups):
        schedule_groups[group](group, section(tensors, f"out/{group}/"), case["tolerance"])


def check_stable_diffusion(group: str, want: Tensors, tolerance: Json) -> None:
    schedule = STABLE_DIFFUSION
    alpha_bar = torch.cat([torch.ones(1), (2 * schedule.log_alpha).exp()])
    got = {
        "betas": schedule.betas,
        "cum_alphas": alpha_bar,
        "cum_betas": torch.cat([torch.zeros(1), -torch.expm1(2 * schedule.log_alpha)]),
        "snr_n1_to_1000": schedule.logsnr(torch.arange(1, 1001, dtype=torch.float64) / 1000).exp(),
    }
    s, t = want.pop("tilde_beta_s"), want.pop("tilde_beta_t")
    got["tilde_beta"] = (1 - alpha_bar[t] / alpha_bar[s]) * (1 - alpha_bar[s]) / (1 - alpha_bar[t])
    assert_close(got, want, tolerance[f"{group} (float64)"])


def check_solver_schedule(schedule: Schedule) -> Callable[[str, Tensors, Json], None]:
    def check(group: str, want: Tensors, tolerance: Json) -> None:
        process = GaussianProcess(schedule, prediction=Eps())
        limit = tolerance.get(group, 1e-4)
        point = node(process, want.pop("t").double())
        got = {
            "alpha": point.alpha,
            "log_alpha": point.alpha.log(),
            "sigma": point.sigma,
            "half_logsnr": point.logsnr / 2,
            "t_of_lambda": schedule.time(2 * want.pop("lambda_query", want.get("half_logsnr")).double()),
        }
        compare(got, want, limit)

    return check


def check_sde(schedule: Schedule) -> Callable[[str, Tensors, Json], None]:
    def check(group: str, want: Tensors, tolerance: Json) -> None:
        t = want.pop("t").double()
        point = node(GaussianProcess(schedule, prediction=Eps()), t)
        # forward SDE: dz = f z dt + g dw with f = d log alpha / dt and g^2 = -sigma^2 d logsnr / dt
        squared = -point.sigma.square() * schedule.derivative(t)
        got = {
            "cum_alpha": point.alpha.square(),
            "cum_beta": point.sigma.square(),
            "snr": point.logsnr.exp(),
            "nsr": (-point.logsnr).exp(),
            "diffusion": squared.sqrt(),
            "drift_of_one": -squared / 2,
        }
        compare(got, want, 1e-4)

    return check


def compare(got: Tensors, want: Tensors, limit: float) -> None:
    """Within `limit` of the largest entry; 1e-2 where the official float32 cancels, at the smallest t of a few."""
    loose = {"sigma", "cum_beta", "half_logsnr", "snr"} & want.keys()  # snr divides by that cum_beta
    first = {k: float((got[k][0] - want[k][0]).abs() / want[k].abs().max()) for k in loose}
    assert all(error <= 1e-2 for error in first.values()), first
    for k in loose:
        got[k] = torch.cat([want[k][:1].double(), got[k][1:].double()])
    assert_close(got, want, limit)


def float32_end(t: float) -> float:
    """Where the official pixel-space grid ends in truth: its sigma^2 = 1 - alpha^2 is a difference in float32."""
    log_alpha = torch.tensor(-(t**2) * (20.0 - 0.1) / 4 - t * 0.1 / 2, dtype=torch.float32)
    logsnr = 2 * log_alpha - torch.log(1 - torch.exp(2 * log_alpha))
    return float(LinearBeta().time(logsnr.double()))


def check_grid(group: str, want: Tensors, tolerance: Json) -> None:
    latent = group == "grid_pp"
    process = GaussianProcess(STABLE_DIFFUSION if latent else LinearBeta(), prediction=Eps())
    end = 1e-3 if latent else float32_end(1e-4)
    got: Tensors = {}
    for name in want:
        first, kind = name.split("/")
        if first == "other":
            rule, steps = kind.rsplit("_N", 1)
            got[name] = SKIPS[rule](t_end=end).times(process, int(steps))
            continue
        solver = latent_solver(int(first), {}) if latent else pixel_solver(int(first), {"eps": end})
        outer = solver.grid.times(process, int(first) if latent else len(solver.orders))
        got[name] = torch.tensor(solver.orders) if kind == "orders" else outer
    assert_close(got, want, 1e-4)


schedule_groups: dict[str, Callable[[str, Tensors, Json], None]] = {
    "sd_discrete": check_stable_diffusion,
    "dpm_discrete": check_solver_schedule(STABLE_DIFFUSION),
    "dpm_linear": check_solver_schedule(LinearBeta()),
    "dpm_cosine": check_solver_schedule(OffsetCosine()),
    "vpsde_linear": check_sde(LinearBeta()),
    "vpsde_cosine": check_sde(OffsetCosine()),
    "grid_pp": check_grid,
    "grid_pixel": check_grid,
}

# -- trajectories


SKIPS: dict[str, type[Grid]] = {
    "time_uniform": UniformTime,
    "logSNR": UniformLogSNR,
    "t2": PowerTime,
    "time_quadratic": PowerTime,
}


def latent_solver(steps: int, options: Json) -> DPMSolver:
    """The sampler of the latent-space code from its options."""
    assert options.get("solver_type", "dpm_solver") == "dpm_solver", "the Taylor variant is not one of the papers'"
    assert not options.get("thresholding"), "thresholding is not one of the papers' options"
    method = options.get("method", "fast")
    return DPMSolver(
        steps=steps,
        grid=SKIPS[options.get("skip_type", "time_uniform")](options.get("T", 1.0), options.get("eps", 1e-3)),
        final="denoise" if options.get("denoise") else "state",
        order=options.get("order", 3),
        form="data" if options.get("predict_x0", True) else "noise",
        method=method,
        inner="grid" if method == "fast" else "logsnr",
    )


def pixel_solver(steps: int, options: Json) -> DPMSolver:
    """The sampler of the pixel-space code from its options."""
    fast = options.get("fast_version", True)
    return DPMSolver(
        steps=steps,
        grid=SKIPS[options.get("skip_type", "logSNR")](options.get("T", 1.0), options.get("eps", 1e-4)),
        order=3 if fast else options["order"],
        form="noise",
        method="fast" if fast else "singlestep",
        inner="logsnr",
    )


class ExactNetwork:
    """A network that says what the exact denoiser believes, in the terms of a prediction, in float32."""

    def __init__(self, oracle: MixtureOracle, prediction: Prediction):
        self.oracle, self.prediction = oracle, prediction

    def __call__(self, z: Tensor, noise_level: Tensor, cond: Condition | None = None) -> Tensor:
        estimate = self.oracle(z.double(), noise_level.double()[0], cond)
        return (estimate.x if isinstance(self.prediction, X0) else estimate.eps).float()

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return self.oracle.null_condition(cond)


def exact_denoiser(
    inputs: Tensors, schedule: Schedule, prediction: Prediction, sub: list[int] | None = None
) -> Denoiser:
    """The denoiser of the case's mixture; label 0 is the components `sub`, label 1, the null class, all of them."""
    process = GaussianProcess(schedule, prediction=prediction, noise_conditioning=TimeConditioning())
    weights = inputs["gmm_weight"]
    chosen = torch.zeros(len(weights), dtype=torch.bool)
    chosen[sub or []] = True
    table = torch.stack([chosen, torch.ones_like(chosen)])
    oracle = MixtureOracle(process, weights, inputs["gmm_mean"], inputs["gmm_std"], table, null=1)
    return Denoiser(ExactNetwork(oracle, prediction), process)


class Recorder:
    """Remembers where a denoiser was called."""

    def __init__(self, denoise: Denoise):
        self.denoise, self.process = denoise, denoise.process
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        self.times.append(t)
        self.states.append(z)
        return self.denoise(z, t, cond)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return self.denoise.null_condition(cond)


def run_dpm_solver(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    latent = case["defaults"]["schedule"].startswith("discrete SD betas")
    assert latent or case["defaults"]["schedule"] == "linear beta 0.1..20"
    defaults = {k: v for k, v in case["defaults"].items() if k not in ("schedule", "order" if not latent else "")}
    got: Tensors = {}
    for name, run in case["runs"].items():
        options = {**defaults, **run}
        steps, cfg = options.pop("steps"), options.pop("cfg", None)
        solver = latent_solver(steps, options) if latent else pixel_solver(steps, options)
        schedule = STABLE_DIFFUSION if latent else LinearBeta()
        denoise: Denoise = exact_denoiser(inputs, schedule, Eps(), cfg and cfg["sub"])
        z, cond = inputs["x_T"], None
        if cfg is not None:
            denoise = ClassifierFree(denoise, cfg["scale"], "cond")
            cond = Condition(label=torch.zeros(len(z), dtype=torch.long))
        recorder = Recorder(denoise)
        x = integrate(recorder, solver, z, Replay(z[:0]), cond)
        got |= {f"{name}/x0": x, f"{name}/t_eval": torch.stack(recorder.times),
                f"{name}/x_eval": torch.stack(recorder.states)}  # fmt: skip
    assert_close(got, section(tensors, "out/"), case["tolerance"]["out"])


def run_euler_maruyama(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    kinds = {"ode": Euler, "sde": EulerMaruyama}
    predictions = {"noise_pred": Eps(), "x0_pred": X0()}
    got: Tensors = {}
    for name, run in case["runs"].items():
        sampler = kinds[run["kind"]](run["sample_steps"], UniformThenZero(), final="state")
        denoise = exact_denoiser(inputs, LinearBeta(), predictions[run["prediction"]])
        trace: list[Moment] = []
        noise = Replay(inputs.get(f"{name}/noise", inputs["x_T"][:0]))
        x = integrate(denoise, sampler, inputs["x_T"], noise, trajectory=trace.append)
        got |= {f"{name}/x0": x, f"{name}/trace": torch.stack([moment.z for moment in trace])}
    assert_close(got, section(tensors, "out/"), case["tolerance"]["out"])


HANDLERS: list[Handler] = [
    (lambda case: case.get("model") == "noise schedules and time grids", run_schedules),
    (lambda case: case.get("model") == "DPM-Solver trajectories on an exact denoiser", run_dpm_solver),
    (lambda case: case.get("model") == "Euler-Maruyama sampler", run_euler_maruyama),
]
