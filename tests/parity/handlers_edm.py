"""Golden cases of improved DDPM, EDM and consistency models: ADM's network, other processes and samplers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_case import Handler, Json, Tensors, assert_close, load_case, section
from handlers_adm import Recorded, beside, losses, walk
from official_configs import adm_config
from torch import Tensor

from diffzoo.models.adm import ADMUNet, adm_levels
from diffzoo.process import (
    EDM,
    BoundaryV,
    DiscreteBetas,
    Eps,
    GaussianProcess,
    LinearLogSNR,
    LogSNRConditioning,
    TimeConditioning,
    denoising_loss,
)
from diffzoo.process.discrete import kept_steps
from diffzoo.sampling import DDIM, Heun, KarrasStops, MultistepConsistency, Respaced, RespacedAncestral, RespacedDDIM
from diffzoo.sampling.denoiser import Denoiser
from diffzoo.sampling.grids import Karras
from diffzoo.sampling.loop import integrate
from diffzoo.sampling.samplers import Sampler
from diffzoo.typing import Condition
from diffzoo.zoo.converters import consistency_models, edm, guided_diffusion

CM_READING, EDM_READING = LogSNRConditioning(-125.0), LogSNRConditioning(-1 / 8)


def load_unet(model: str, config: Json, state: Tensors, size: int) -> tuple[ADMUNet, Any]:
    """The network of a case, and the converter that it came through."""
    if model == "EDM U-Net":
        levels = adm_levels(
            config["img_resolution"],
            config["model_channels"],
            config["num_blocks"],
            config["channel_mult"],
            config["attn_resolutions"],
        )
        ours = adm_config(
            {"image_size": size, "model_channels": config["model_channels"], "out_channels": 3, "num_res_blocks": 1}
        )
        ours = replace(
            ours,
            num_classes=config["label_dim"],
            null_class=True,
            levels=levels,
            head_channels=16,
            attention_order="new",
            scale_shift_norm=True,
            residual_resampling=True,
        )
        converter: Any = edm
    else:
        new = {"use_new_attention_order": True} if model == "CM U-Net" else {}  # whatever the flag says
        ours = adm_config({**config, **new, "image_size": size})
        converter = consistency_models if new else guided_diffusion
    network = ADMUNet(ours)  # type: ignore[arg-type]
    network.load_state_dict(converter.from_official(state, ours))
    return network.eval(), converter


def lent(case: Json, folder: Path, size: int) -> tuple[ADMUNet, Any]:
    """The network whose weights another case lends."""
    unet, weights = load_case(beside(folder, case["state_from"].split()[0] + ".json"))
    return load_unet(unet["model"], unet["config"], section(weights, "state/"), size)


def condition(inputs: Tensors) -> Condition | None:
    """Labels as indices; a row of zeros is the null class."""
    if "labels_onehot" in inputs:
        rows = inputs["labels_onehot"]
        return Condition(label=torch.where(rows.any(1), rows.argmax(1), rows.shape[1]))
    return Condition(label=inputs["y"]) if "y" in inputs else None


def process_of(reading: LogSNRConditioning, **changes: Any) -> GaussianProcess:
    """EDM's preconditioning, over a range that holds every recorded noise level."""
    schedule = LinearLogSNR(-9.5, 13.0)
    return replace(GaussianProcess(schedule, noise_conditioning=reading, data_scale=0.5, output_sign=-1), **changes)


def times(process: GaussianProcess, sigma: Tensor) -> Tensor:
    return process.schedule.time(-2 * sigma.double().log())


def run_unet(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, tolerance = section(tensors, "in/"), case["tolerance"]
    x = inputs["x"].requires_grad_()
    network, converter = load_unet(case["model"], case["config"], section(tensors, "state/"), x.shape[-1])
    level = inputs["timesteps"].float() if "timesteps" in inputs else inputs["sigma"].log() / 4
    output = network(x, level, condition(inputs))
    loss = (output * inputs["probe"]).sum()
    loss.backward()
    want = section(tensors, "out/")
    probe = float(want.pop("probe_loss"))
    assert abs(float(loss.detach()) - probe) <= tolerance["out"] * case["probe_loss_scale"]
    got = {"model_output": output}
    if "denoised" in want:
        process = process_of(EDM_READING)
        t = times(process, inputs["sigma"])
        noisy = inputs["x_noisy"] * process.coefficients(t)[0].float().reshape(-1, 1, 1, 1)
        with torch.no_grad():
            got["denoised"] = Denoiser(network, process)(noisy, t, condition(inputs)).x
    assert_close(got, want, tolerance["out"])
    compare_gradients(network, converter, {**section(tensors, "grad/")}, case, {"in.x": x.grad})


def compare_gradients(network: ADMUNet, converter: Any, want: Tensors, case: Json, more: Any = None) -> None:
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    got = {**converter.to_official(grads, network.config), **(more or {})}
    ignored = case.get("near_zero_gradients", ())
    assert_close(got, {k: v for k, v in want.items() if k not in ignored}, case["tolerance"]["grad"])


# -- improved DDPM


def iddpm_process(entry: Json) -> GaussianProcess:
    scale = (1000.0, -1000 / entry["steps"]) if entry.get("rescale_timesteps") else (entry["steps"], -1.0)
    return GaussianProcess(
        DiscreteBetas(entry["schedule"], entry["steps"]),
        prediction=Eps(),
        noise_conditioning=TimeConditioning(*scale),
        learned_variance=True,
    )


def run_iddpm_trajectories(case: Json, tensors: Tensors, folder: Path) -> None:
    start = tensors["in/x_T"]
    network, _ = lent(case, folder, start.shape[-1])
    for entry in case["entries"]:
        key, steps = entry["key"], kept_steps(entry["respacing"], entry["steps"])
        assert list(steps) == entry["kept_steps"]
        grid = Respaced(respacing=entry["respacing"])
        kind = RespacedDDIM if entry["sampler"] == "ddim" else RespacedAncestral
        denoise = Denoiser(network, iddpm_process(entry))
        got = walk(denoise, kind(len(steps), grid), start, Recorded(tensors[f"in/{key}/step_noise"]), None)
        want = section(tensors, f"out/{key}/")
        got["network_times"] = got.pop("network_timesteps")
        assert_close(got, want, case["tolerance"]["out"])


def run_iddpm_losses(case: Json, tensors: Tensors, folder: Path) -> None:
    x, eps, limit = tensors["in/x_start"], tensors["in/noise"], case["tolerance"]["out"]
    for entry in case["entries"]:
        process = iddpm_process(entry)
        t = (tensors["in/t"].double() + 1) / entry["steps"]
        output = tensors["in/model_output"].clone().requires_grad_()
        kind = ("rescaled_" if entry["rescale_learned_sigmas"] else "") + ("kl" if entry["use_kl"] else "mse")
        z = process.add_noise(x, eps, t)
        got = losses({**entry, "loss_type": kind}, process, output, x, z, eps, t, "learned")
        got["loss"].sum().backward()
        assert_close(got, section(tensors, f"out/{entry['key']}/"), limit)
        grad = section(tensors, f"grad/{entry['key']}/")
        assert_close({"model_output": output.grad}, grad, case["tolerance"].get("grad", limit))


# -- EDM and consistency models


@contextmanager
def watched(network: ADMUNet) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What the network is given: inputs and noise levels of all calls."""
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])

    def note(module: Any, args: Any) -> None:
        seen[0].append(args[0])
        seen[1].append(args[1][0])

    handle = network.register_forward_pre_hook(note)
    yield seen
    handle.remove()


def sampled(denoise: Denoiser, sampler: Sampler, noise: Tensor, draws: Tensor | None, cond: Condition | None) -> Tensor:
    """From `80 noise` in units of the data to an image, in float64 as the state of the official loops may be."""
    alpha = denoise.process.coefficients(sampler.times(denoise.process)[:1])[0]
    recorded = Recorded(draws if draws is not None else noise[None])
    watch = lambda moment: setattr(recorded, "step", moment.step + 1)  # noqa: E731
    return integrate(denoise, sampler, 80 * alpha * noise.double(), recorded, cond, trajectory=watch)


class Float32(Denoiser):
    """The state in float64, the network's input in float32."""

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Any:
        level = self.process.noise_level(t).float().expand(len(z))
        return self.process.interpret(self.network(z.float(), level, cond).double(), z, t)


def run_cm_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    network, _ = lent(case, folder, inputs["noise"].shape[-1])
    for entry in case["entries"]:
        prediction = {"prediction": BoundaryV(0.002 / 0.5)} if entry["distillation"] else {}
        process = process_of(CM_READING, schedule=LinearLogSNR(), **prediction)
        clip, n = 1.0 if entry["clip_denoised"] else None, entry["steps"]
        samplers: dict[str, Sampler] = {
            "heun": Heun(n - 1, clip=clip),
            "euler": DDIM(n - 1, Karras(), clip, "denoise"),
            "onestep": MultistepConsistency(),
        }
        if "ts" in entry:
            stops = tuple(entry["ts"][:-1])
            samplers["multistep"] = MultistepConsistency(len(stops), KarrasStops(levels=n, stops=stops))
        key = entry["key"]
        with watched(network) as (states, levels):
            draws = tensors.get(f"in/{key}/step_noise")
            sample = sampled(
                Float32(network, process), samplers[entry["sampler"]], inputs["noise"], draws, condition(inputs)
            )
        got = {
            "sample": sample.clamp(-1, 1),
            "network_inputs": torch.stack(states),
            "network_times": torch.stack(levels),
        }
        assert_close(got, section(tensors, f"out/{key}/"), case["tolerance"]["out"])


def run_edm_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    network, _ = lent(case, folder, inputs["noise"].shape[-1])
    process = process_of(EDM_READING, schedule=LinearLogSNR())
    for entry in case["entries"]:
        churn = {"S_churn": "churn", "S_min": "churn_min", "S_max": "churn_max", "S_noise": "churn_noise"}
        options = {ours: float(entry[theirs]) for theirs, ours in churn.items() if theirs in entry}
        key = entry["key"]
        with watched(network) as (_, levels):
            draws = tensors[f"in/{key}/step_noise"]
            sampler = Heun(entry["num_steps"] - 1, **options)
            sample = sampled(Float32(network, process), sampler, inputs["noise"], draws, condition(inputs))
        got = {"sample": sample, "sigmas_of_calls": (4 * torch.stack(levels).double()).exp()}
        assert_close(got, section(tensors, f"out/{key}/"), case["tolerance"]["out"])


def run_edm_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, want = section(tensors, "in/"), section(tensors, "out/")
    network, converter = lent(case, folder, inputs["x"].shape[-1])
    process = process_of(EDM_READING)
    sigma = (1.2 * inputs["normal"] - 1.2).exp()
    x, eps, t = inputs["x"], inputs["noise"], times(process, sigma)
    z, target = process.add_noise(x, eps, t), process.target(x, eps, t)
    output = network(z, process.noise_level(t).float(), condition(inputs))
    elements = (output - target).square()
    got = {"sigma": sigma, "vp_z": z, "F": output, "V_target": -target, "loss_elements": elements}
    assert_close(got, want, case["tolerance"]["out"])
    # the weighting holds the density of noise levels, which the official code draws from
    density = torch.distributions.Normal(2.4, 2.4).log_prob(process.logsnr(t)).exp() * -process.schedule.derivative(t)
    weighted = denoising_loss(process, EDM(), (output,), x, eps, t) / density
    assert_close({"mean": weighted}, {"mean": want["loss_elements"].flatten(1).mean(1)}, case["tolerance"]["out"])
    elements.flatten(1).sum(1).mean().backward()
    compare_gradients(network, converter, section(tensors, "grad/"), case)


def scaled(network: ADMUNet, factor: float) -> ADMUNet:
    """The same network with every parameter multiplied."""
    other = ADMUNet(network.config)
    other.load_state_dict({k: v * factor for k, v in network.state_dict().items()})
    return other.to(next(network.parameters()).dtype).eval()


def run_cm_losses(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, want = section(tensors, "in/"), section(tensors, "out/")
    network, converter = lent(case, folder, inputs["x"].shape[-1])
    process, cond = process_of(CM_READING), condition(inputs)
    boundary = replace(process, prediction=BoundaryV(0.002 / 0.5))
    x, eps, limit = inputs["x"], inputs["noise"], case["tolerance"]["out"]
    t = times(process, inputs["sigma"])
    estimate = Denoiser(network, process)(process.add_noise(x, eps, t), t, cond)
    error = (estimate.x - x).square().flatten(1).mean(1)
    edm_loss = error * (inputs["sigma"] ** -2 + 4)
    edm_loss.mean().backward()
    assert_close({"edm_loss": edm_loss, "edm_xs_mse": error}, {k: want[k] for k in ("edm_loss", "edm_xs_mse")}, limit)
    compare_gradients(network, converter, section(tensors, "grad/edm/"), case)
    network = network.double()  # the two terms of a consistency loss nearly cancel
    network.zero_grad()
    x, eps = x.double(), eps.double()

    # in float32, as the official code has them: the network reads 250 ln(sigma), where the last digit shows
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigma = (first + torch.arange(case["num_scales"]) / (case["num_scales"] - 1) * (last - first)) ** 7
    teacher, target = Denoiser(scaled(network, 0.97), process), Denoiser(scaled(network, 1.02), boundary)
    cd, ct = [], []
    for row, index in enumerate(inputs["index"].tolist()):
        part = slice(row, row + 1)
        t, s = times(process, sigma[index]), times(process, sigma[index + 1])
        one = cond[part] if cond is not None else None
        z, clean = process.add_noise(x[part], eps[part], t), process.add_noise(x[part], eps[part], s)
        guided = lambda z, t, one=one: teacher(z, t, one)  # noqa: E731
        guided.process = process  # type: ignore[attr-defined]
        with torch.no_grad():
            earlier, _ = Heun(1).step(guided, z, t, s, None, Recorded(eps))  # type: ignore[arg-type]
            wanted = [target(state, s, one).x for state in (earlier, clean)]
        jump = Denoiser(network, boundary)(z, t, one).x
        for losses_of, aim in zip((cd, ct), wanted, strict=True):
            losses_of.append((jump - aim).square().mean())
    got = {"cd_loss": torch.stack(cd), "ct_loss": torch.stack(ct)}
    assert_close(got, {k: want[k] for k in got}, limit)
    got["cd_loss"].mean().backward()
    compare_gradients(network, converter, section(tensors, "grad/cd/"), case)


def is_model(name: str) -> Any:
    return lambda case: case.get("model") == name


HANDLERS: list[Handler] = [
    *((is_model(name), run_unet) for name in ("iDDPM U-Net", "CM U-Net", "EDM U-Net")),
    (is_model("iDDPM sampling"), run_iddpm_trajectories),
    (is_model("iDDPM losses"), run_iddpm_losses),
    (is_model("CM sampling"), run_cm_sampling),
    (is_model("EDM sampling"), run_edm_sampling),
    (is_model("EDM loss"), run_edm_loss),
    (is_model("CM losses"), run_cm_losses),
]
