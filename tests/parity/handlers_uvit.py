"""U-ViT: outputs, gradients, time embedding and loss."""

from pathlib import Path

import torch
from golden_case import Handler, Json, Tensors, assert_close, section
from guided_sampling import run_sampling
from official_configs import uvit_config

from diffzoo.models.uvit_bao import UViTBao
from diffzoo.nn.embeddings import cosine_sine
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess, TimeConditioning, UniformEps, denoising_loss
from diffzoo.typing import Condition
from diffzoo.zoo.converters.uvit_bao import from_official, to_official


def network_of(case: Json, tensors: Tensors) -> UViTBao:
    """The case's network with its official weights, through the production converter."""
    network = UViTBao(uvit_config(case["config"]))
    network.load_state_dict(from_official(section(tensors, "state/"), network.config))
    return network.eval()


def process_of() -> GaussianProcess:
    return GaussianProcess(schedule=DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012), prediction=Eps(),
                           noise_conditioning=TimeConditioning(1000.0))  # fmt: skip


def run_network(case: Json, tensors: Tensors, folder: Path) -> None:
    network, inputs = network_of(case, tensors), section(tensors, "in/")
    x = inputs["x"].requires_grad_()
    pred = network(x, inputs["t"], Condition(label=inputs.get("y"), text=inputs.get("context")))
    loss = (pred * inputs["probe"]).sum()
    sinusoid = cosine_sine(inputs["t"], network.config.width)
    got = {"pred": pred, "probe_loss": loss[None], "time_embedding": sinusoid}
    assert_close(got, section(tensors, "out/"), case["tolerance"]["out"])
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
    official = to_official(grads, network.config) | {"in.x": x.grad}
    assert_close(official, section(tensors, "grad/"), case["tolerance"]["grad"])


def run_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    network, process, inputs = network_of(case, tensors), process_of(), section(tensors, "in/loss_")
    t = inputs["n"].double() / process.schedule.steps  # type: ignore[attr-defined]
    xn = process.add_noise(inputs["x0"], inputs["noise"], t)
    cond = Condition(label=inputs.get("y"), text=inputs.get("context"))
    outputs = network.training_outputs(xn, process.noise_level(t).float(), cond)
    loss = denoising_loss(process, UniformEps(), outputs, inputs["x0"], inputs["noise"], t)
    assert_close({"per_sample": loss, "xn": xn}, section(tensors, "out/loss_"), case["tolerance"]["out"])


def run_guided(case: Json, tensors: Tensors, folder: Path) -> None:
    run_sampling(case, tensors, network_of(case, tensors), process_of())


def _of_uvit(case: Json) -> bool:
    return {"embed_dim", "patch_size"} <= case.get("config", {}).keys()


def _has(case: Json, tensor: str) -> bool:
    return tensor in case.get("tensors", {})


HANDLERS: list[Handler] = [
    (lambda case: _of_uvit(case) and _has(case, "out/pred"), run_network),
    (lambda case: _of_uvit(case) and _has(case, "in/loss_n"), run_loss),
    (lambda case: _of_uvit(case) and "cfg_scale" in case, run_guided),
]
