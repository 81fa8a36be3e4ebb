"""Plans against closed forms: chains of operations whose memory and operations can be counted by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from data.stand_ins import write_images
from torch import Tensor, nn

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models.base import Config, Network
from diffzoo.models.summary import example_inputs
from diffzoo.recipe.files import find_recipe
from diffzoo.training.gpus import GIB, GPU, GPUS, find_gpu, present_gpu
from diffzoo.training.planning import NetworkCost, Plan, flops_per_image, network_cost


class Chain(Network):
    """`depth` exponentials, each of which keeps its output for the backward pass, then a product."""

    def __init__(self, config: Config, depth: int = 6):
        super().__init__(config)
        self.depth = depth
        self.linear = nn.Linear(config.image_size, config.image_size, bias=False)

    def forward(self, z: Tensor, noise_level: Tensor, cond=None) -> Tensor:
        z = self.linear(z)
        for _ in range(self.depth):
            z = z.exp()
        return z


def chain(size: int = 16) -> Chain:
    with torch.device("meta"):
        return Chain(Config(image_size=size, in_channels=3))


def test_flops_are_two_per_multiply_add() -> None:
    """A (3·16, 16) by (16, 16) product per image."""
    assert flops_per_image(chain()) == 2 * 3 * 16 * 16 * 16


def test_activations_of_a_chain() -> None:
    """Depth outputs are alive at the end of the forward pass, and the loss's square and two gradients for a moment."""
    cost = network_cost(chain(), half=False)
    plane = 3 * 16 * 16 * 4
    assert 7 * plane <= cost.activations <= 10 * plane
    assert 2 * plane <= cost.forward <= 3 * plane
    assert cost.parameters == cost.trainable == 256
    assert cost.hardware_flops == 3 * cost.flops


def test_activations_are_those_that_a_real_pass_keeps() -> None:
    """The forward peak of a real network holds at least what autograd saves, and not much more."""
    from diffzoo.models.registry import build

    network = build("simple_uvit_xs_32")
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    z, level, cond = example_inputs(network.config, 8, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = network.training_outputs(z, level, cond)
    saved = sum(kept.values()) / 8
    cost = network_cost(network, half=False)
    assert len(outputs) == 1
    assert 0.9 * saved < cost.activations < 1.4 * saved


@pytest.mark.slow
def test_half_precision_and_recomputation_save_memory() -> None:
    from diffzoo.models.registry import build

    with torch.device("meta"):
        network = build("simple_uvit_xs_32")
    full, half = network_cost(network, half=False), network_cost(network)
    network.set_grad_checkpointing(True)
    recomputed = network_cost(network)
    assert half.activations < 0.8 * full.activations
    assert recomputed.activations < 0.5 * half.activations
    assert recomputed.hardware_flops == 4 * recomputed.flops
    assert recomputed.flops == half.flops == full.flops


COST = NetworkCost(10**8, 10**8, 1e11, 0.5 * GIB, 0.2 * GIB, 0.1 * GIB, False)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
@pytest.mark.parametrize("devices", [1, 4])
def test_largest_micro_batch_is_the_largest(gpu: GPU, devices: int) -> None:
    plan = Plan(COST, batch=1024, devices=devices, averages=2)
    largest = plan.largest_micro_batch(gpu)
    assert plan.training(largest) <= gpu.usable
    assert largest == 1024 // devices or plan.training(largest + 1) > gpu.usable
    fitting = plan.fitting_micro_batch(gpu)
    assert fitting <= largest
    assert (1024 // devices) % fitting == 0


def test_parts_by_hand() -> None:
    plan = Plan(COST, optimizer_states=2, averages=3, batch=8, devices=2, shards=2, frozen_encoders=5.0)
    assert plan.parts() == {"weights": 2e8, "optimizer": 4e8, "averages": 6e8, "autoencoder and text encoder": 5.0}
    assert plan.training(4) == pytest.approx(1.2e9 + 5 + 2e8 + 2.2 * GIB)
    alone = replace(plan, devices=1, shards=1)
    assert alone.training(8) == pytest.approx(2.4e9 + 5 + 4.2 * GIB)  # gradients come as activations go
    assert alone.training(4) == pytest.approx(2.4e9 + 5 + 2.2 * GIB + 4e8)  # they are being accumulated


def test_nothing_fits() -> None:
    assert Plan(replace(COST, parameters=10**11, trainable=10**11)).largest_micro_batch(GPUS["t4"]) == 0


def test_time() -> None:
    """At 50 % of 300 TFLOPs, 3e11 operations per image are 500 images/s."""
    gpu = GPU("x", 1.0, 300)
    plan = Plan(COST, batch=100, steps=3600, mfu=0.5)
    assert plan.images_per_second(gpu) == pytest.approx(500)
    assert plan.hours(gpu) == pytest.approx(3600 * 100 / 500 / 3600)


def test_names_of_cards() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "h100"
    assert find_gpu("NVIDIA A100-SXM4-40GB").name == "a100-40"
    assert find_gpu("NVIDIA A100-SXM4-80GB").name == "a100-80"
    assert find_gpu("NVIDIA GeForce RTX 4090").name == "rtx4090"
    assert find_gpu("NVIDIA L40S").name == "l40s"
    assert find_gpu("Tesla T4").name == "t4"
    assert find_gpu("Tesla V100-SXM2-16GB").name == "v100"
    with pytest.raises(UserError, match="did you mean 'h100'"):
        find_gpu("h1000x")


def test_present_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available() or present_gpu() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert present_gpu() == GPU("h200", 150_000_000_000, 989)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "emoji/simple_uvit_xs_32", "--gpu", "t4", "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)
    assert metadata["fits"]
    assert metadata["gpu"] == "t4"
    assert main(["plan", "emoji/simple_uvit_xs_32", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for line in ("parameters", "FLOPs per image", "weights", "optimizer", "averages", "evaluation step", "autoencoder"):
        assert line in text


def test_settings_and_overlays_as_for_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One recipe that says it all is planned like a recipe, an overlay and settings that say it together."""

    def plan(*arguments: str) -> dict:
        assert main(["plan", *arguments, "--gpu", "t4", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    name = "emoji/simple_uvit_xs_32"
    whole = yaml.safe_load(find_recipe(name).read_text())
    whole["model"]["network_args"] = {"num_classes": 200, "depth_at": {8: 1}}
    whole["model"]["grad_checkpointing"] = True
    whole["data"]["init_args"] |= {"batch_size": 96, "micro_batch_size": 8}
    whole["trainer"]["max_steps"] = 77
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 77}\ndata: {init_args: {micro_batch_size: 4}}\n")
    settings = ["--model.network_args={num_classes: 200, depth_at: {8: 1}}", "--data.init_args.batch_size", "96",
                "--data.init_args.micro_batch_size", "8", "--model.grad_checkpointing", "true"]  # fmt: skip
    expected = plan(str(tmp_path / "whole.yaml"))
    assert expected["micro_batch"] == 8
    assert plan("-c", name, "-c", str(overlay), *settings) == expected
    assert plan(*settings, name, "--trainer.max_steps=77") == expected
    two = plan(name, "--devices=2")
    sharded = plan("-c", name, "--trainer.devices", "2",
                   "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy")  # fmt: skip
    assert sharded == plan(name, "--devices=2", "--shards=2")
    assert sharded["bytes"]["weights"] == two["bytes"]["weights"] / 2


def test_the_advice_of_a_run_without_memory_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "images", ["a/0.png", "b/0.png"])
    recipe, settings = "emoji/simple_uvit_xs_32", ["--data.folder", str(tmp_path / "images"), "--gpu=t4", "--json"]
    assert main(["plan", "-c", recipe, "--data.init_args.micro_batch_size", "4", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["micro_batch"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe"),
        (["-c", "emoji/simple_uvit_xs_32", "--model.netwrk=x"], "no key 'model.netwrk'; did you mean 'model.network'"),
        (["emoji/simple_uvit_xs"], "did you mean"),
        (["emoji/simple_uvit_xs_32", "--gpu", "h1000"], "did you mean"),
        (["emoji/simple_uvit_xs_32", "--mfu", "2"], "--mfu"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_recipe_in_another_form(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network by `create_model`, timm's optimizer, several EMAs, latent frozen encoders."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model:\n"
        "  network: {class_path: diffzoo.create_model, init_args: {name: simple_uvit_xs_32, num_classes: 7}}\n"
        "  optimizer: {class_path: diffzoo.training.TimmOptimizer, init_args: {name: lion, lr: 1.0e-4}}\n"
        "  autoencoder: {class_path: KLAutoencoder}\n"
        "trainer: {callbacks: [{class_path: EMA, init_args: {decays: [0.9], stds: [0.05, 0.1]}}]}\n"
    )
    assert main(["plan", str(recipe), "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)
    weights = 4 * metadata["parameters"]
    assert metadata["bytes"]["optimizer"] == weights
    assert metadata["bytes"]["averages"] == 3 * weights
    assert metadata["bytes"]["autoencoder and text encoder"] == 336e6
    parsed = recipe.read_text().replace(", num_classes: 7}}", "}, dict_kwargs: {num_classes: 7}}")
    parsed = parsed.replace("KLAutoencoder", "diffzoo.encoders.KLAutoencoder")
    recipe.write_text(parsed + "data: {class_path: DemoData, init_args: {image_size: 32}}\n")
    assert main(["plan", str(recipe), "--trainer.max_steps=1", "--json"]) == 0  # as `fit` parses it
    again = json.loads(capsys.readouterr().out)
    assert (again["parameters"], again["bytes"]["averages"]) == (metadata["parameters"], metadata["bytes"]["averages"])
    recipe.write_text("model: {network: {class_path: my.Net}}\n")
    assert main(["plan", str(recipe)]) == 2
    recipe.write_text("model: [\n")
    assert main(["plan", str(recipe)]) == 2
