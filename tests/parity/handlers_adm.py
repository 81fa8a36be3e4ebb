"""ADM's golden cases: U-Nets through the production converter, the discrete process and sampling trajectories."""

from pathlib import Path

import torch
from golden_case import Handler, Json, Tensors, assert_close, section
from torch import Tensor

from diffzoo.models.adm import ADMUNet
from diffzoo.typing import Condition
from diffzoo.zoo.converters.guided_diffusion import config_from_official, from_official, to_official

# -- U-Nets


def load_unet(config: Json, state: Tensors, image_size: int) -> ADMUNet:
    """The network of a case. These U-Nets take any size; ours is told the one of the recorded input."""
    options = {**config, "image_size": image_size}
    ours = config_from_official(options)
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


HANDLERS: list[Handler] = [
    (lambda case: case.get("model") == "ADM U-Net", run_unet),
]
