"""Golden cases of the adaLN-Zero transformers: DiT, SiT, REPA, JiT, LightningDiT, RAE's DiT-DH, and PixNerd."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_case import Handler, Json, Tensors, assert_close, load_case, section
from handlers_adm import Recorded, beside
from handlers_edm import Float32, is_model, watched
from official_configs import dit_config, pixnerd_config
from torch import Tensor

from diffzoo.models.base import Network
from diffzoo.models.dit import DiT
from diffzoo.models.pixnerd import PixNerd
from diffzoo.process import (
    X0,
    Cosine,
    DiscreteBetas,
    Eps,
    Flow,
    GaussianProcess,
    LinearBeta,
    LinearTime,
    Shifted,
    Straight,
    TimeConditioning,
    UniformFlow,
    VariancePreserving,
    alignment_loss,
    denoising_loss,
    direction_loss,
)
from diffzoo.process.discrete import hybrid_loss, kept_steps, variational_bound
from diffzoo.sampling import (
    DDIM,
    Autoguidance,
    ClassifierFree,
    Euler,
    EulerMaruyama,
    FlowHeun,
    Interval,
    Respaced,
    RespacedAncestral,
    ShiftedTime,
    UniformThenZero,
    UniformTime,
)
from diffzoo.sampling.denoiser import Denoise, Denoiser
from diffzoo.sampling.loop import Moment, integrate
from diffzoo.sampling.samplers import Sampler
from diffzoo.typing import Condition
from diffzoo.zoo.converters import dit as dit_converter
from diffzoo.zoo.converters import pixnerd as pixnerd_converter

FAMILIES = {"DiT": "DiT", "SiT": "SiT", "REPA SiT": "REPA", "JiT": "JiT", "LightningDiT": "LightningDiT"}

# over the whole of [0, 1], up to rounding
TIME = LinearTime(-40, 40)
FROM_NOISE = GaussianProcess(TIME, Straight(), Flow(), TimeConditioning(-1.0, 1.0), output_sign=-1)  # SiT
FROM_DATA = GaussianProcess(TIME, Straight(), Flow(), TimeConditioning())  # REPA, RAE
DDPM = GaussianProcess(
    DiscreteBetas("linear"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0), learned_variance=True
)


def jit(noise_scale: float) -> GaussianProcess:
    schedule = Shifted(LinearTime(-40, 26), 1, noise_scale)  # n times the noise at every time
    return GaussianProcess(schedule, Straight(noise_scale), X0(), TimeConditioning(-1.0, 1.0))


# -- networks


def load_network(model: str, config: Json, state: Tensors, size: int) -> Network:
    """A network with official weights; PixNerd's arguments leave its image size open."""
    if model == "PixNerd":
        pixels = pixnerd_config(config, size)
        network: Network = PixNerd(pixels)
        network.load_state_dict(pixnerd_converter.from_official(state, pixels))
        return network.eval()
    ours = dit_config(config, FAMILIES.get(model, "RAE"))
    network = DiT(ours)
    network.load_state_dict(dit_converter.from_official(state, ours))
    return network.eval()


def lent(case: Json, folder: Path) -> Any:
    """The network whose weights another case lends."""
    lender, weights = load_case(beside(folder, case["state_from"].split()[0] + ".json"))
    return load_network(lender["model"], lender["config"], section(weights, "state/"), weights["in/x"].shape[-1])


def compare_gradients(network: Network, want: Tensors, case: Json, more: Any = None) -> None:
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    grads |= {name: torch.zeros_like(b) for name, b in network.named_buffers()}
    back: Any = pixnerd_converter if isinstance(network, PixNerd) else dit_converter
    got = {**back.to_official(grads, network.config), **(more or {})}
    ignored = case.get("near_zero_gradients", ())
    assert_close(got, {k: v for k, v in want.items() if k not in ignored}, case["tolerance"]["grad"])


def run_network(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, limit = section(tensors, "in/"), case["tolerance"]["out"]
    x = inputs["x"].requires_grad_()
    network = load_network(case["model"], case["config"], section(tensors, "state/"), x.shape[-1])
    output = network(x, inputs["t"].float(), Condition(label=inputs["y"]))
    loss = (output * inputs["probe"]).sum()
    loss.backward()
    want = section(tensors, "out/")
    assert abs(float(loss.detach()) - float(want.pop("probe_loss"))) <= limit * case["probe_loss_scale"]
    assert_close({"model_output": output}, want, limit)
    compare_gradients(network, section(tensors, "grad/"), case, {"in.x": x.grad})


# -- losses


def diffuse(
    network: Network, process: GaussianProcess, x: Tensor, eps: Tensor, t: Tensor, label: Tensor
) -> tuple[Tensor, Tensor]:
    """z and the network's output."""
    z = process.add_noise(x, eps, t)
    return z, network(z, process.noise_level(t).float(), Condition(label=label))


def run_dit_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network = section(tensors, "in/"), lent(case, folder)
    x, eps, t = inputs["x0"], inputs["noise"], (inputs["t"].double() + 1) / 1000
    z, output = diffuse(network, DDPM, x, eps, t, inputs["y"])
    loss, bound = hybrid_loss(DDPM, output, x, z, eps, t), variational_bound(DDPM, output, x, z, t)
    got = {"loss": loss, "vb": bound, "mse": loss - bound}
    assert_close(got, section(tensors, "out/"), case["tolerance"]["out"])
    loss.mean().backward()
    compare_gradients(network, section(tensors, "grad/"), case)


def run_sit_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network = section(tensors, "in/"), lent(case, folder)
    x, eps, t = inputs["x"], inputs["noise"], 1 - inputs["t"].double()
    paths = {
        "Linear": FROM_NOISE,
        "GVP": replace(FROM_NOISE, schedule=Cosine(-40, 40), path=VariancePreserving()),
        "VP": replace(FROM_NOISE, schedule=LinearBeta(max_logsnr=40), path=VariancePreserving()),
    }
    for name, process in paths.items():
        z, output = diffuse(network, process, x, eps, t, inputs["y"])
        d_alpha, d_sigma = (
            (process.schedule.derivative(t) * d).float().reshape(-1, 1, 1, 1)
            for d in process.derivatives_at(process.logsnr(t))
        )
        target = -(d_alpha * x + d_sigma * eps)
        loss = (output - target).square().flatten(1).mean(1)
        want = section(tensors, f"out/{name}/")
        assert_close({"x_t": z, "target": target, "loss": loss}, want, case["tolerance"]["out"])
        if name == "Linear":
            weighed = denoising_loss(process, UniformFlow(), (output,), x, eps, t)
            assert_close({"loss": weighed}, {"loss": want["loss"]}, case["tolerance"]["out"])
            weighed.mean().backward()
            compare_gradients(network, section(tensors, "grad/"), case)


def run_jit_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network, want = section(tensors, "in/"), lent(case, folder), section(tensors, "out/")
    noise, process = case["noise_scale"], jit(case["noise_scale"])
    x, eps, t = inputs["x"], inputs["noise"], 1 - inputs["t"].double()
    z, output = diffuse(network, process, x, eps, t, inputs["y"])
    loss = denoising_loss(process, UniformFlow(case["t_eps"], noise), (output,), x, eps, t)
    got = {"z": z, "x_pred": output, "per_sample": loss, "loss": loss.mean()[None]}
    assert_close(got, want, case["tolerance"]["out"])
    loss.mean().backward()
    compare_gradients(network, section(tensors, "grad/"), case)


def run_cosine_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network = section(tensors, "in/"), lent(case, folder)
    x, eps, t = inputs["x"], inputs["noise"], 1 - inputs["t"].double()
    _, output = diffuse(network, FROM_NOISE, x, eps, t, inputs["y"])
    mse = denoising_loss(FROM_NOISE, UniformFlow(), (output,), x, eps, t)
    cosine = direction_loss(output, FROM_NOISE.target(x, eps, t))
    assert_close({"mse": mse, "cosine": cosine}, section(tensors, "out/"), case["tolerance"]["out"])
    (mse + cosine).mean().backward()
    compare_gradients(network, section(tensors, "grad/"), case)


def run_rae_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network, s = section(tensors, "in/"), lent(case, folder), case["time_shift"]
    x, eps, u = inputs["x"], inputs["noise"], inputs["u"].double()
    t = s * u / (1 + (s - 1) * u)
    _, output = diffuse(network, FROM_DATA, x, eps, t, inputs["y"])
    loss = denoising_loss(FROM_DATA, UniformFlow(), (output,), x, eps, t)
    assert_close({"t": t, "loss": loss}, section(tensors, "out/"), case["tolerance"]["out"])
    loss.mean().backward()
    compare_gradients(network, section(tensors, "grad/"), case)


def run_repa_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, network = section(tensors, "in/"), lent(case, folder)
    x, eps, t = inputs["x"], inputs["noise"], inputs["t"].double()
    z = FROM_DATA.add_noise(x, eps, t)
    output, tokens = network.aligned(z, FROM_DATA.noise_level(t).float(), Condition(label=inputs["y"]))
    loss = denoising_loss(FROM_DATA, UniformFlow(), (output,), x, eps, t)
    projection = alignment_loss(tokens, inputs["features"]).mean()
    got = {"denoising": loss, "projection": projection[None]}
    assert_close(got, section(tensors, "out/"), case["tolerance"]["out"])
    (loss.mean() + 0.5 * projection).backward()
    compare_gradients(network, section(tensors, "grad/"), case)


# -- sampling


def walked(
    network: Network, denoise: Denoise, sampler: Sampler, start: Tensor, label: Tensor, draws: Tensor | None = None
) -> Tensors:
    """All states from the start to the result, what was believed, and the times that the network was given."""
    noise = Recorded(start[None] if draws is None else draws)
    moments: list[Moment] = []

    def watch(moment: Moment) -> None:
        moments.append(moment)
        noise.step = moment.step + 1

    with watched(network) as (_, levels):  # type: ignore[arg-type]
        integrate(denoise, sampler, start, noise, Condition(label=label), trajectory=watch)
    return {
        "states": torch.stack([m.z for m in moments]),
        "pred_xstart": torch.stack([m.x_hat for m in moments[:-1]]),
        "times": distinct(torch.stack(levels)),
    }


def distinct(times: Tensor) -> Tensor:
    """Times of consecutive calls, each once: guidance and drift call the network several times at one."""
    return torch.stack([t for i, t in enumerate(times) if i == 0 or t != times[i - 1]])


def compare(got: Tensors, want: Tensors, case: Json, states: str = "samples", skip_start: bool = False) -> None:
    found = {states: got["states"][1:] if skip_start else got["states"], "network_times": got["times"]}
    wanted = {**want, "network_times": distinct(want["network_times"])}
    assert_close(found, {k: wanted[k] for k in found}, case["tolerance"]["out"])


def run_dit_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network, start = lent(case, folder), tensors["in/x_T"]
    for entry in case["entries"]:
        key, steps = entry["key"], kept_steps(entry["respacing"], 1000)
        assert list(steps) == entry["kept_steps"]
        guided = ClassifierFree(Denoiser(network, DDPM), entry["cfg_scale"], channels=case["guided_channels"])
        said: list[Tensor] = []

        class Heard:
            process, null_condition = guided.process, guided.null_condition

            def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None, inner: Any = guided) -> Any:
                estimate = inner(z, t, cond)
                said.append(torch.cat([estimate.eps, estimate.variance], dim=1))  # noqa: B023
                return estimate

        sampler = RespacedAncestral(len(steps), Respaced(respacing=entry["respacing"]), clip=None)
        draws = tensors[f"in/{key}/step_noise"]
        got = walked(network, Heard(), sampler, start, tensors["in/y"], draws)
        want = section(tensors, f"out/{key}/")
        found = {
            "samples": got["states"][1:],
            "pred_xstart": got["pred_xstart"],
            "guided_output": torch.stack(said),
            "network_timesteps": got["times"][:, None].expand(-1, len(start)),
        }
        assert_close(found, want, case["tolerance"]["out"])


def run_sit_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network, start, label = lent(case, folder), tensors["in/x_T"], tensors["in/y"]
    guided = ClassifierFree(Denoiser(network, FROM_NOISE), case["cfg_scale"], channels=case["guided_channels"])
    near = UniformThenZero(t_end=0.04)
    for entry in case["entries"]:
        key, points = entry["key"], entry["num_steps_argument"]
        want, draws = section(tensors, f"out/{key}/"), tensors.get(f"in/{key}/step_noise")
        if entry["kind"] == "ode":
            kinds: dict[str, Sampler] = {
                "euler": Euler(points - 1, final="state"),
                "heun2": FlowHeun(points - 1, euler_end=False),
            }
            compare(walked(network, guided, kinds[entry["method"]], start, label), want, case)
            continue
        sde = EulerMaruyama(points, near, diffusion="sigma", strength=2 * entry["norm"], final="state")
        if entry["last"] == "Tweedie":
            sde = replace(sde, final="x_hat")
        got = walked(network, guided, sde, start, label, draws)
        if entry["last"] == "Euler":  # without the score's part
            before = got["states"][-2]
            end = DDIM(1, UniformTime(0.04, 0.0), final="state")
            got["states"][-1] = walked(network, guided, end, before, label)["states"][-1]
        compare(got, want, case, skip_start=True)


def run_repa_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network, start, label = lent(case, folder), tensors["in/x_T"].double(), tensors["in/y"]
    for entry in case["entries"]:
        key, steps = entry["key"], entry["num_steps"]
        low, high = entry.get("guidance_low", 0.0), entry.get("guidance_high", 1.0)
        interval = Interval(low, high) if (low, high) != (0.0, 1.0) else None
        guided = ClassifierFree(Float32(network, FROM_DATA), entry["cfg_scale"], interval=interval)
        sampler: Sampler = Euler(steps, final="state")
        if key == "sde":
            sampler = EulerMaruyama(steps, UniformThenZero(t_end=0.04), diffusion="sigma", strength=2.0, final="state")
        elif entry.get("heun"):
            sampler = FlowHeun(steps)
        got = walked(network, guided, sampler, start, label, tensors.get(f"in/{key}/step_noise"))
        got["states"] = got["states"][-1]
        compare(got, section(tensors, f"out/{key}/"), case, "x0")


def run_jit_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network = lent(case, folder)
    for entry in case["entries"]:
        first, last = entry["interval_min"], entry["interval_max"]  # both excluded, but a first of 0 excludes nothing
        interval = Interval(1 - last + 1e-6, 1 - first - 1e-6 if first else 1.0)
        process, steps = jit(entry["noise_scale"]), entry["num_sampling_steps"]
        guided = ClassifierFree(Denoiser(network, process), entry["cfg"], interval=interval, batched=False)
        heun = entry["sampling_method"] == "heun"
        sampler: Sampler = FlowHeun(steps, floor=entry["t_eps"]) if heun else Euler(steps, final="state")
        start = entry["noise_scale"] * tensors["in/noise"]
        got = walked(network, guided, sampler, start, tensors["in/y"])
        compare(got, section(tensors, f"out/{entry['key']}/"), case, skip_start=True)


def run_lightning_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network = lent(case, folder)
    for entry in case["entries"]:
        interval = Interval(-1e-6, 1 - entry["cfg_interval_start"])
        guided = ClassifierFree(
            Denoiser(network, FROM_NOISE), entry["cfg_scale"], interval=interval, channels=case["guided_channels"]
        )
        # their shift counts from the noise
        grid = ShiftedTime(shift=1 / entry["timestep_shift"]) if entry["timestep_shift"] else UniformTime()
        sampler = Euler(entry["num_steps_argument"] - 1, grid, final="state")
        got = walked(network, guided, sampler, tensors["in/x_T"], tensors["in/y"])
        compare(got, section(tensors, f"out/{entry['key']}/"), case)


def run_pixnerd_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network = lent(case, folder)
    for entry in case["entries"]:
        first, last = entry["guidance_interval_min"], entry["guidance_interval_max"]  # both excluded
        interval = Interval(1 - last + 1e-6, 1 - first - 1e-6)
        guided = ClassifierFree(Denoiser(network, FROM_NOISE), entry["guidance"], interval=interval)
        sampler = Euler(entry["num_steps"], final="state")
        got = walked(network, guided, sampler, tensors["in/x_T"], tensors["in/y"])
        want = section(tensors, f"out/{entry['key']}/")
        compare(got, {"network_times": want.pop("times")[:-1], **want}, case)


def run_rae_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    network = lent(case, folder)
    weak = load_network("RAE", case["guide_config"], section(tensors, "state/guide."), 0)
    main, guide = Denoiser(network, FROM_DATA), Denoiser(weak, FROM_DATA)
    for entry in case["entries"]:
        s = entry["time_shift"]
        guided: Denoise = Autoguidance(main, guide, entry["scale"])
        if entry["guidance"] == "cfg":
            guided = ClassifierFree(main, entry["scale"], interval=Interval(*entry["interval"]))
        grid = ShiftedTime(t_end=0.001 * s / (1 + 0.001 * (s - 1)), shift=s)
        sampler = Euler(entry["num_steps_argument"] - 1, grid, final="state")
        got = walked(network, guided, sampler, tensors["in/x_T"], tensors["in/y"])
        compare(got, section(tensors, f"out/{entry['key']}/"), case)


RUNS: dict[str, Callable[[Json, Tensors, Path], None]] = {
    **dict.fromkeys(FAMILIES, run_network),
    "RAE DiT-DH": run_network,
    "PixNerd": run_network,
    "PixNerd sampling": run_pixnerd_sampling,
    "DiT loss": run_dit_loss,
    "SiT loss": run_sit_loss,
    "JiT loss": run_jit_loss,
    "LightningDiT loss": run_cosine_loss,
    "RAE loss": run_rae_loss,
    "REPA loss": run_repa_loss,
    "DiT sampling": run_dit_sampling,
    "SiT sampling": run_sit_sampling,
    "REPA sampling": run_repa_sampling,
    "JiT sampling": run_jit_sampling,
    "LightningDiT sampling": run_lightning_sampling,
    "RAE sampling": run_rae_sampling,
}
HANDLERS: list[Handler] = [(is_model(name), run) for name, run in RUNS.items()]
