"""DiMR: outputs of every stage, gradients, loss, an optimizer step, and the building blocks."""

import re
from pathlib import Path

import torch
from golden_case import Handler, Json, Tensors, assert_close, deviation, section
from guided_sampling import run_sampling
from official_configs import dimr_config
from torch import Tensor, nn

from diffzoo.models.dimr import DiMR, DiMRConfig, DiMRStage, Stage, Upsample
from diffzoo.nn.axial_rope import AxialRotary, QueryKeyNorm, axial_positions
from diffzoo.nn.time_dependent import (
    AdaRMSNorm,
    RMSNorm,
    TimeDependentLayerNorm,
    TimeDependentParameter,
    TimeDependentRMSNorm,
)
from diffzoo.process import (
    DiscreteBetas,
    Eps,
    GaussianProcess,
    TimeConditioning,
    UniformEps,
    denoising_loss,
    pool_target,
)
from diffzoo.typing import Condition
from diffzoo.zoo.converters.dimr import from_official, to_official


def network_of(case: Json, tensors: Tensors) -> DiMR:
    """The case's network with its official weights, through the production converter."""
    network = DiMR(dimr_config(case["config"]))
    network.load_state_dict(from_official(section(tensors, "state/"), network.config))
    return network.eval()


def process_of() -> GaussianProcess:
    return GaussianProcess(schedule=DiscreteBetas("scaled_linear", 1000, 0.00085, 0.012), prediction=Eps(),
                           noise_conditioning=TimeConditioning(8.0, -4.0))  # fmt: skip


def official_gradients(network: DiMR) -> Tensors:
    """Gradients under the official names, zero where there is none."""
    grads = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    grads |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return to_official(grads, network.config)


def condition_of(inputs: Tensors) -> Condition:
    return Condition(label=inputs.get("y"), text=inputs.get("text_embeds"), text_mask=inputs.get("text_mask"))


def run_network(case: Json, tensors: Tensors, folder: Path) -> None:
    network, inputs = network_of(case, tensors), section(tensors, "in/")
    x = inputs["x"].requires_grad_()
    outputs = network.training_outputs(x, inputs["log_snr"], condition_of(inputs))
    got = {f"stage{k}": out for k, out in enumerate(outputs)}
    want = section(tensors, "out/")
    assert len(outputs) == sum(name.startswith("stage") for name in want)
    loss = torch.stack([(out * inputs[f"probe{k}"]).sum() for k, out in enumerate(outputs)]).sum()
    assert_close(got | {"probe_loss": loss[None]}, want, case["tolerance"]["out"])
    loss.backward()
    assert_close(official_gradients(network) | {"in.x": x.grad}, section(tensors, "grad/"), case["tolerance"]["grad"])
    weights = to_official(network.state_dict(keep_vars=True), network.config)
    idle = {name for name, p in weights.items() if p.requires_grad and p.grad is None}
    assert idle <= set(case.get("params_without_grad", [])), "parameters without a gradient"
    with torch.no_grad():
        last = network(x, inputs["log_snr"], condition_of(inputs))
    assert_close({"last": last}, {"last": outputs[-1]}, 1e-6)


def run_loss(case: Json, tensors: Tensors, folder: Path) -> None:
    network, process, inputs = network_of(case, tensors), process_of(), section(tensors, "in/")
    want, limit = section(tensors, "out/"), case["tolerance"]
    t = inputs["n"].double() / process.schedule.steps  # type: ignore[attr-defined]
    x0, noise = inputs["x0"], inputs["noise"]
    xn, level = process.add_noise(x0, noise, t), process.noise_level(t).float()
    outputs = network.training_outputs(xn, level, Condition(label=inputs.get("y")))
    per_sample = denoising_loss(process, UniformEps(), outputs, x0, noise, t, coefficients=case["loss_coeffs"])
    loss = per_sample.mean()
    loss.backward()
    got = {"xn": xn, "log_snr": level, "loss_per_sample": per_sample, "loss": loss[None]}
    for out in outputs:
        target = process.target(x0, noise, t)
        got[f"target_{out.shape[-1]}"] = pool_target(target, -(-target.shape[-1] // out.shape[-1]))
    got["grad_norm"] = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()[None]
    assert_close(official_gradients(network), section(tensors, "grad/"), limit["grad"])
    got |= {f"after_adamw/{name}": p for name, p in adamw_step(network).items()}
    assert_close(got, want, limit["out"])
    if list(case["loss_coeffs"]) == [1 / 4**i for i in reversed(range(len(outputs)))]:
        default = denoising_loss(process, UniformEps(), outputs, x0, noise, t)
        assert_close({"loss": default}, {"loss": per_sample}, 1e-7)


def adamw_step(network: DiMR) -> Tensors:
    """One step of the official optimizer: gates are exempt from weight decay."""
    exempt = network.no_weight_decay()
    groups = [
        {"params": [p for n, p in network.named_parameters() if n not in exempt], "weight_decay": 0.03},
        {"params": [p for n, p in network.named_parameters() if n in exempt], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=2e-4, betas=(0.99, 0.99), eps=1e-8).step()
    return to_official(network.state_dict(), network.config)


def run_guided(case: Json, tensors: Tensors, folder: Path) -> None:
    run_sampling(case, tensors, network_of(case, tensors), process_of())


# -- building blocks


def run_units(case: Json, tensors: Tensors, folder: Path) -> None:
    inputs, want = section(tensors, "in/"), section(tensors, "out/")
    state = section(tensors, "state/")
    got = norm_units(inputs, state, case["dims"]["d"])
    got |= rotary_units(inputs, state, want, case["dims"])
    got |= map_units(inputs, state, want)
    if "position_embeddings" in want:
        table = state["position_embeddings.position_embeddings.weight"]
        grids = table_grids(case, table, inputs["x4"])
        maps = [positioned(inputs["x4"], table, grid) for grid in grids]
        got["position_embeddings"] = min(maps, key=lambda got: deviation(got, want["position_embeddings"]))
    assert_close(got, want, case["tolerance"]["out"])


def loaded(module: nn.Module, state: Tensors, unit: str) -> nn.Module:
    """A module with the weights of one unit, under our names."""
    names = {"param0": "high", "param1": "low", "nodecay_weight": "slope", "nodecay_bias": "shift"}
    weights = {}
    for name, tensor in section(state, f"{unit}.").items():
        *path, last = name.split(".")
        weights[".".join([*path, names.get(last, last)])] = tensor
    module.load_state_dict(weights)
    return module.eval()


def norm_units(inputs: Tensors, state: Tensors, d: int) -> Tensors:
    tau = inputs["log_snr"] / 4
    gates = loaded(TimeDependentParameter(d, 1.0), {f"tdp.{k}": v for k, v in section(inputs, "tdp.").items()}, "tdp")
    norms = {
        "td_layernorm": TimeDependentLayerNorm(d),
        "td_rmsnorm": TimeDependentRMSNorm(d),
        "td_rmsnorm_bias": TimeDependentRMSNorm(d, bias=True),
        "rmsnorm": RMSNorm(d),
        "ada_rmsnorm": AdaRMSNorm(d),
    }
    small = {"td_layernorm": "x3_small_1e-3", "td_rmsnorm": "x3_small_1e-8", "rmsnorm": "x3_small_1e-8"}
    got: Tensors = {"tdp": gates(tau)}
    for name, norm in norms.items():
        loaded(norm, state, name)
        got[f"{name}.x3"], got[f"{name}.x4"] = norm(inputs["x3"], tau), norm(inputs["x4"], tau)
        got[f"{name}.x3.same_t"] = norm(inputs["x3"], tau[1].expand(len(tau)))
        if name in small:
            got[f"{name}.small"] = norm(inputs[small[name]], tau)
    ada = norms["ada_rmsnorm"]
    got["ada_rmsnorm.small"] = ada(inputs["x3_small_1e-3"], tau, inputs["x3"][:, :1])
    return got


def rotary_units(inputs: Tensors, state: Tensors, want: Tensors, dims: dict[str, int]) -> Tensors:
    norm = loaded(QueryKeyNorm(dims["heads"]), {"qk.log_scale": state["qk_norm.scale"]}, "qk")
    rotary = AxialRotary(dims["hd"], dims["heads"])
    got: Tensors = {
        "qk_norm": norm(inputs["q"]),
        "qk_norm.small": norm(0.001 * inputs["q"]),
        "axial_rope_init_log_freqs": rotary.log_frequencies_row.detach().clone(),
    }
    for name in want:
        if name.startswith("axial_pos_"):
            got[name] = axial_positions(*map(int, name.removeprefix("axial_pos_").split("x")))
    rows = {"r.log_frequencies_row": "freqs_h", "r.log_frequencies_column": "freqs_w"}
    loaded(rotary, {ours: state[f"axial_rope.{official}"] for ours, official in rows.items()}, "r")
    for name in want:
        if name.startswith("axial_rope_") and "init" not in name:
            grid = map(int, name.removeprefix("axial_rope_").split("x"))
            got[name] = rotary(inputs["q"], axial_positions(*grid))
    return got


def map_units(inputs: Tensors, state: Tensors, want: Tensors) -> Tensors:
    got: Tensors = {}
    for name in want:
        if name.startswith("pixel_shuffle_up"):
            got[name] = shuffled(inputs["x4"], state, name)
        if name.startswith("even_down_"):
            got[name] = pooled(inputs["image"], int(name.removeprefix("even_down_")))
        if name.startswith("multi_scale_"):
            parity, kind, width = name.removeprefix("multi_scale_").split("_")
            got[name] = scaled_target(inputs[f"noise_{parity}"], int(width), mean=kind == "mean")
    return got


def shuffled(x: Tensor, state: Tensors, unit: str) -> Tensor:
    """The linear layer and the cell order of `Upsample`, its norms left out."""
    ratio = int(unit.removeprefix("pixel_shuffle_up"))
    weights = {f"u.{k}": v for k, v in section(state, f"{unit}.kernel.").items()}
    width = weights["u.weight"].shape[0] // ratio**2
    upsample = Upsample(x.shape[-1], width, ratio)
    loaded(upsample.expand, weights, "u")

    class Same(nn.Module):
        def forward(self, x: Tensor, tau: Tensor) -> Tensor:
            return x

    upsample.norm_in, upsample.norm_out = Same(), Same()  # type: ignore[assignment]
    return upsample(x, torch.zeros(len(x)))


def entrance(grid: tuple[int, int], width: int, channels: int, image_ratio: int) -> Stage:
    """A stage whose entrance passes the input through: identity patches, no positions."""
    metadata = DiMRStage("convnext", grid, width=width, hidden=width, depth=1, image_ratio=image_ratio, kernel_size=1)
    size = (grid[0] * image_ratio, grid[1] * image_ratio)
    stage = Stage(metadata, DiMRConfig(image_size=max(size), in_channels=channels, stages=(metadata,)), None)
    nn.init.zeros_(stage.positions)
    nn.init.dirac_(stage.patch.weight)
    nn.init.zeros_(stage.patch.bias)
    return stage


def pooled(image: Tensor, ratio: int) -> Tensor:
    grid, channels = (image.shape[2] // ratio, image.shape[3] // ratio), image.shape[1]
    stage = entrance(grid, channels, channels, ratio)
    return stage._enter(image, torch.zeros(len(image)), None).permute(0, 3, 1, 2)


def table_grids(case: Json, table: Tensor, x: Tensor) -> list[tuple[int, int]]:
    """The grid of a position table, as the case says, "table (7,9) ..."; else all that the map fits into."""
    cells, (rows, columns) = len(table), x.shape[1:3]
    stated = re.search(r"table \((\d+), ?(\d+)\)", str(case.get("semantics", {}).get("position_embeddings")))
    if stated and int(stated[1]) * int(stated[2]) == cells:
        return [(int(stated[1]), int(stated[2]))]
    return [(r, cells // r) for r in range(rows, cells // columns + 1) if cells % r == 0]


def positioned(x: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    width = x.shape[-1]
    stage = entrance(grid, width, width, 1)
    stage.positions.data = table
    return stage._enter(x.permute(0, 3, 1, 2), torch.zeros(len(x)), None)


def scaled_target(noise: Tensor, width: int, mean: bool) -> Tensor:
    full = noise.shape[-1]
    ratio = -(-full // width) if full % 2 == 0 else (full - 1) // (width - 1)
    target = pool_target(noise, ratio)
    if ratio == 1 or not mean:
        return target
    return target / (ratio + full % 2)


def _of_dimr(case: Json) -> bool:
    return "stage_configs" in case.get("config", {})


HANDLERS: list[Handler] = [
    (lambda case: _of_dimr(case) and not case.keys() & {"loss_coeffs", "cfg_scale"}, run_network),
    (lambda case: _of_dimr(case) and "loss_coeffs" in case, run_loss),
    (lambda case: _of_dimr(case) and "cfg_scale" in case, run_guided),
    (lambda case: str(case.get("model", "")).startswith("DiMR") and "dims" in case, run_units),
]
