"""ADM's golden cases: U-Nets through the production converter, the discrete process and sampling trajectories."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from discrete_chain import RespacedSteps
from golden_case import Handler, Json, Tensors, assert_close, load_case, roots, section
from official_configs import adm_config
from torch import Tensor

from diffzoo.models.adm import ADMUNet
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess, TimeConditioning, UniformEps, denoising_loss
from diffzoo.process.discrete import (
    ReverseVariance,
    hybrid_loss,
    kept_steps,
    prior_bits,
    reverse_moments,
    variational_bound,
)
from diffzoo.process.predictions import X0
from diffzoo.sampling.denoiser import Denoiser
from diffzoo.sampling.discrete import Respaced, RespacedAncestral, RespacedDDIM
from diffzoo.sampling.loop import Moment, integrate
from diffzoo.sampling.samplers import Sampler
from diffzoo.typing import Condition
from diffzoo.zoo.converters.guided_diffusion import from_official, to_official

# -- U-Nets


def load_unet(config: Json, state: Tensors, image_size: int) -> ADMUNet:
    """The network of a case. These U-Nets take any size; ours is told the one of the recorded input."""
    options = {**config, "image_size": image_size}
    ours = adm_config(options)
    network = ADMUNet(ours)  # type: ignore[arg-type]
    network.load_state_dict(from_official(state, ours))
    return network.eval()


def run_unet(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, tolerance = section(tensors, "in/"), case["tolerance"]
    x = inputs["x"].requires_grad_()
    network = load_unet(case["config"], section(tensors, "state/"), x.shape[-1])
    cond = Condition(label=inputs.get("y"), low_res=inputs.get("low_res"))
    output = network(x, inputs["timesteps"].float(), cond)
    loss = (output * inputs["probe"]).sum()
    loss.backward()
    want = section(tensors, "out/")
    scale = case.get("probe_loss_scale") or float(want["probe_loss"])
    assert abs(float(loss.detach()) - float(want.pop("probe_loss"))) <= tolerance["out"] * scale
    assert_close({"model_output": output}, want, tolerance["out"])
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    official = {**to_official(grads, network.config), "in.x": x.grad}
    assert_close(official, section(tensors, "grad/"), tolerance["grad"])


# -- the discrete process


def discrete_process(entry: Json) -> GaussianProcess:
    """The process of an entry that names schedule, steps and kinds of mean and variance."""
    mean = {"epsilon": Eps, "start_x": X0}[entry.get("mean_type", "epsilon")]
    return GaussianProcess(
        DiscreteBetas(entry["schedule"], entry["steps"]),
        prediction=mean(),
        noise_conditioning=TimeConditioning(entry["steps"], -1.0),
        learned_variance=entry.get("var_type", "learned_range") == "learned_range",
    )


def discrete_steps(entry: Json) -> RespacedSteps:
    return RespacedSteps(discrete_process(entry).schedule, entry["respacing"])


def variance_kind(entry: Json) -> ReverseVariance:
    kind = entry["var_type"]
    return "learned" if kind == "learned_range" else kind


def run_tables(case: Json, tensors: Tensors, folder: Path) -> None:
    for entry in case["entries"]:
        chain = discrete_steps(entry)
        step, alpha_bar = chain.reverse, (2 * chain.log_alpha).exp()
        got = {
            "timestep_map": chain.indices,
            "betas": step.log_beta.exp(),
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": torch.cat([torch.ones(1), alpha_bar[:-1]]),
            "alphas_cumprod_next": torch.cat([alpha_bar[1:], torch.zeros(1)]),
            "log_one_minus_alphas_cumprod": torch.log(-torch.expm1(2 * chain.log_alpha)),
            "posterior_variance": step.variance,
            "posterior_log_variance_clipped": step.log_variance,
            "posterior_mean_coef1": step.mean_x,
            "posterior_mean_coef2": step.mean_z,
            "sqrt_recip_alphas_cumprod": (-chain.log_alpha).exp(),
            "sqrt_recipm1_alphas_cumprod": torch.expm1(-2 * chain.log_alpha).sqrt(),
        }
        assert_close(got, section(tensors, f"out/{entry['key']}/"), case["tolerance"]["out"])


def run_respacing(case: Json, tensors: Tensors, folder: Path) -> None:
    for entry in case["entries"]:
        if entry["error"]:
            with pytest.raises(ValueError, match="steps"):
                kept_steps(entry["respacing"], entry["num_timesteps"])
        else:
            assert list(kept_steps(entry["respacing"], entry["num_timesteps"])) == entry["steps"]


def run_reverse_moments(case: Json, tensors: Tensors, folder: Path) -> None:
    z, gradient = tensors["in/x"], tensors["in/guidance_gradient"]
    for entry in case["entries"]:
        process, chain, kind = discrete_process(entry), discrete_steps(entry), variance_kind(entry)
        index = tensors[f"in/{entry['key']}/t"]
        t = chain.times[index]
        output = tensors["in/model_output6" if process.learned_variance else "in/model_output3"]
        estimate = process.interpret(output, z, t)
        if entry["clip_denoised"]:
            estimate = process.clip(estimate, z, t, 1.0)
        moments = reverse_moments(chain.step(index), estimate, z, kind)
        got = {
            "network_timesteps": process.noise_level(t).float(),
            "mean": moments.mean,
            "variance": moments.variance.expand_as(z),
            "log_variance": moments.log_variance.expand_as(z),
            "pred_xstart": estimate.x,
            "guided_mean": moments.mean + moments.variance * gradient,
            "guided_ddim_pred_xstart": process.add_score(estimate, z, t, gradient).x,
        }
        assert_close(got, section(tensors, f"out/{entry['key']}/"), case["tolerance"]["out"])


def run_losses(case: Json, tensors: Tensors, folder: Path) -> None:
    x, eps = tensors["in/x_start"], tensors["in/noise"]
    for entry in case["entries"]:
        process, chain, kind = discrete_process(entry), discrete_steps(entry), variance_kind(entry)
        key, limits = entry["key"], case["tolerance"]
        t = chain.times[tensors[f"in/{key}/t"]]
        output = tensors[f"in/{key}/model_output"].clone().requires_grad_()
        z = process.add_noise(x, eps, t)
        got = {"x_t": z, "prior_bpd": prior_bits(process, x), **losses(entry, process, output, x, z, eps, t, kind)}
        got["loss"].sum().backward()
        want = section(tensors, f"out/{key}/")
        assert_close(got, {"x_t": want.pop("x_t")}, limits["out"])
        assert_close({k: got[k] / v for k, v in want.items()}, {k: v / v for k, v in want.items()}, limits["out"])
        grads = {k: v for k, v in section(tensors, f"grad/{key}/").items() if k == "model_output"}
        assert_close({"model_output": output.grad}, grads, limits["grad"])


def losses(
    entry: Json,
    process: GaussianProcess,
    output: Tensor,
    x: Tensor,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    kind: ReverseVariance,
) -> Tensors:
    """The official terms and their sum; rescaled kinds multiply the bound by the steps (over 1000 beside the error)."""
    rescaled, steps = entry["loss_type"].startswith("rescaled"), entry["steps"]
    if entry["loss_type"].endswith("kl"):
        bound = variational_bound(process, output, x, z, t, kind)
        return {"loss": bound * steps if rescaled else bound}
    if not process.learned_variance:
        error = denoising_loss(process, UniformEps(), (output,), x, eps, t)
        return {"mse": error, "loss": error}
    weight = steps / 1000 if rescaled else 1.0
    total = hybrid_loss(process, output, x, z, eps, t, weight)
    bound = weight * variational_bound(process, output, x, z, t, kind)
    return {"mse": total - bound, "vb": bound, "loss": total}


# -- trajectories


class Recorded:
    """The recorded noise, one entry per step."""

    def __init__(self, draws: Tensor):
        self.draws, self.step = draws, 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self.draws[self.step]


def beside(folder: Path, name: str) -> Path:
    """The case that lends its weights: in the same folder, or among all others."""
    places = [folder / name, *(p for root in roots() for p in sorted(root.rglob(name)))]
    found = [p for p in places if p.exists()]
    assert found, f"{name}, which lends its weights, is nowhere"
    return found[0]


def run_trajectories(case: Json, tensors: Tensors, folder: Path) -> None:
    unet, weights = load_case(beside(folder, case["state_from"].split()[0]).with_suffix(".json"))
    start, draws, limit = tensors["in/x_T"], tensors["in/step_noise"], case["tolerance"]["out"]
    network = load_unet(unet["config"], section(weights, "state/"), start.shape[-1])
    cond = Condition(label=tensors["in/y"]) if "in/y" in tensors else None
    for entry in case["entries"]:
        noise = Recorded(draws)
        got = walk(Denoiser(network, discrete_process(entry)), sampler_of(entry), start, noise, cond)
        want = section(tensors, f"out/{entry['key']}/")
        assert torch.equal(got["network_timesteps"], want["network_timesteps"].float())
        for name in ("samples", "pred_xstart"):
            steps = range(len(want[name]))
            assert_close(
                {f"{name} {i}": got[name][i] for i in steps}, {f"{name} {i}": want[name][i] for i in steps}, limit
            )
        pixels = ((got["samples"][-1] + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        assert (pixels.int() - want["uint8_nhwc"].int()).abs().max() <= 1


def sampler_of(entry: Json) -> Sampler:
    steps = len(kept_steps(entry["respacing"], entry["steps"]))
    clip = 1.0 if entry["clip_denoised"] else None
    if entry["method"] == "ddim":
        return RespacedDDIM(steps, Respaced(respacing=entry["respacing"]), clip, eta=entry["eta"])
    return RespacedAncestral(steps, Respaced(respacing=entry["respacing"]), clip)


def walk(denoise: Denoiser, sampler: Sampler, start: Tensor, noise: Recorded, cond: Condition | None) -> Tensors:
    """What the official loop records, seen through the production loop."""
    states: list[Tensor] = []
    believed: list[Tensor] = []

    def watch(moment: Moment) -> None:
        states.append(moment.z)
        believed.append(moment.x_hat)
        noise.step = moment.step + 1

    integrate(denoise, sampler, start, noise, cond, trajectory=watch)
    level = denoise.process.noise_level(sampler.times(denoise.process)[:-1]).float()
    return {
        "samples": torch.stack(states[1:]),
        "pred_xstart": torch.stack(believed[:-1]),
        "network_timesteps": level[:, None].expand(-1, len(start)),
    }


HANDLERS: list[Handler] = [
    (lambda case: case.get("model") == "ADM U-Net", run_unet),
    (lambda case: case.get("model") == "ADM diffusion tables", run_tables),
    (lambda case: case.get("model") == "ADM timestep respacing", run_respacing),
    (lambda case: case.get("model") == "ADM p_mean_variance", run_reverse_moments),
    (lambda case: case.get("model") == "ADM training losses", run_losses),
    (lambda case: case.get("model") == "ADM sampling trajectories", run_trajectories),
]
