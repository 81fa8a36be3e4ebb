"""Golden cases of EDM2: the network, its loss with learned uncertainty, sampling under a guiding network."""

from pathlib import Path
from typing import Any

import torch
from golden_case import Handler, Json, Tensors, assert_close, load_case, section
from handlers_adm import beside
from handlers_edm import EDM_READING, condition, is_model, process_of, times
from torch import Tensor

from diffzoo.models.base import Level
from diffzoo.models.edm2 import EDM2Config, EDM2UNet
from diffzoo.process import LinearLogSNR, uncertainty_loss
from diffzoo.sampling import Autoguidance, Heun
from diffzoo.sampling.denoiser import Denoiser
from diffzoo.sampling.loop import integrate
from diffzoo.zoo.converters.edm2 import from_official, to_official


def load_unet(config: Json, state: Tensors) -> EDM2UNet:
    levels = []
    for i, multiplier in enumerate(config["channel_mult"]):
        size = config["img_resolution"] >> i
        width = multiplier * config["model_channels"]
        levels.append(Level(size, width, config["num_blocks"], size in config["attn_resolutions"]))
    ours = EDM2Config(
        config["img_resolution"],
        config["img_channels"],
        num_classes=config["label_dim"],
        levels=tuple(levels),
        head_channels=config["channels_per_head"],
    )
    network = EDM2UNet(ours)
    network.load_state_dict(from_official(state, ours))
    return network.eval()


def lent(name: str, folder: Path) -> EDM2UNet:
    unet, weights = load_case(beside(folder, f"{name}.json"))
    return load_unet(unet["config"], section(weights, "state/"))


def compare_gradients(network: EDM2UNet, want: Tensors, case: Json, more: Any = None) -> None:
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    grads |= {name: torch.zeros_like(b) for name, b in network.named_buffers()}
    got = {**to_official(grads, network.config), **(more or {})}
    ignored = case.get("near_zero_gradients", ())
    assert_close(got, {k: v for k, v in want.items() if k not in ignored}, case["tolerance"]["grad"])


def run_unet(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, want, limit = section(tensors, "in/"), section(tensors, "out/"), case["tolerance"]["out"]
    network = load_unet(case["config"], section(tensors, "state/"))
    x, level, cond = inputs["x"].requires_grad_(), inputs["sigma"].log() / 4, condition(inputs)
    output = network(x, level, cond)
    loss = (output * inputs["probe"]).sum()
    loss.backward()
    assert abs(float(loss.detach()) - float(want.pop("probe_loss"))) <= limit * case["probe_loss_scale"]
    process = process_of(EDM_READING)
    t = times(process, inputs["sigma"])
    noisy = inputs["x_noisy"] * process.coefficients(t)[0].float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        denoised = Denoiser(network, process)(noisy, t, cond).x
    got = {"model_output": output, "denoised": denoised, "logvar": network.log_variance(level)}
    assert_close(got, want, limit)
    compare_gradients(network, section(tensors, "grad/"), case, {"in.x": x.grad})


class InOrder:
    """The recorded noise in the order in which it was drawn."""

    def __init__(self, draws: Tensor):
        self.draws = iter(draws)

    def normal(self, shape: Any) -> Tensor:
        return next(self.draws)


def run_sampling(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    main, guide = case["state_from"].split(";")
    process = process_of(EDM_READING, schedule=LinearLogSNR())
    denoise = Denoiser(lent(main.split()[0], folder), process)
    weak = Denoiser(lent(guide.split()[-1], folder), process)
    for entry in case["entries"]:
        churn = {"S_churn": "churn", "S_min": "churn_min", "S_max": "churn_max", "S_noise": "churn_noise"}
        options = {ours: float(entry[theirs]) for theirs, ours in churn.items() if theirs in entry}
        sampler = Heun(entry["num_steps"] - 1, **options)
        start = 80 * process.coefficients(sampler.times(process)[:1])[0].float() * inputs["noise"]
        noise = InOrder(tensors.get(f"in/{entry['key']}/step_noise", inputs["noise"]))
        guided = Autoguidance(denoise, weak, float(entry["guidance"]))
        sample = integrate(guided, sampler, start, noise, condition(inputs))
        assert_close({"sample": sample}, section(tensors, f"out/{entry['key']}/"), case["tolerance"]["out"])


def run_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs = section(tensors, "in/")
    process = process_of(EDM_READING)
    sigma = (case["P_std"] * inputs["normal"] + case["P_mean"]).exp()
    x, eps, t = inputs["x"], inputs["noise"], times(process, sigma)
    for mode in ("eval", "train"):
        network = lent(case["state_from"].split()[0], folder).train(mode == "train")
        level = process.noise_level(t).float()
        output = network(process.add_noise(x, eps, t), level, condition(inputs))
        error = (output - process.target(x, eps, t)).square()
        elements = uncertainty_loss(error, network.log_variance(level))
        want = section(tensors, f"out/{mode}/")
        after = {k.removeprefix("weights_after/"): v for k, v in want.items() if k.startswith("weights_after/")}
        assert_close({"loss": elements}, {"loss": want["loss_elements"]}, case["tolerance"]["out"])
        assert_close(to_official(network.state_dict(), network.config), after, case["tolerance"]["out"])
        (elements.sum() / len(x)).backward()
        compare_gradients(network, section(tensors, f"grad/{mode}/"), case)


HANDLERS: list[Handler] = [
    (is_model("EDM2 U-Net"), run_unet),
    (is_model("EDM2 sampling"), run_sampling),
    (is_model("EDM2 loss"), run_loss),
]
