"""Low-rank adapters: PEFT's networks, our files. From a run to a run, to a folder, to the Hub and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data.stand_ins import write_images
from networks import FAMILIES, perturbed
from safetensors import safe_open
from torch import Tensor

from diffzoo import load_any
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models import registry, simple_uvit
from diffzoo.models.adapters import merge, plain_name
from diffzoo.models.summary import example_inputs
from diffzoo.process import Cosine, GaussianProcess
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.training.freezing import depths
from diffzoo.training.lora import LoRA, adapter_state, inject
from diffzoo.training.planning import flops_per_image
from diffzoo.zoo import save_pretrained

# Lightning's own: few workers, deprecated parts of torch
pytestmark = [
    pytest.mark.usefixtures("without_report"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


ADAPTABLE = [family for family in FAMILIES if family != "EDM2UNet"]


def test_a_family_whose_weights_are_normalised_refuses_adapters() -> None:
    network, config = FAMILIES["EDM2UNet"]
    with pytest.raises(UserError, match="EDM2UNet takes no low-rank adapters"):
        inject(network(config), LoRA())


@pytest.mark.parametrize("family", ADAPTABLE)
def test_merged_weights_compute_what_the_adapted_network_does(family: str) -> None:
    network, config = FAMILIES[family]
    net = perturbed(network(config)).eval()
    base, inputs = {k: v.clone() for k, v in net.state_dict().items()}, example_inputs(config, 2, "cpu")
    with torch.no_grad():
        before = net(*inputs)
        targets = inject(net, LoRA(rank=3, alpha=6.0))
        torch.testing.assert_close(net(*inputs), before)  # one matrix is zero at first
        perturbed(net)
        adapted = net(*inputs)
    adapter = adapter_state(net)
    assert {k for k in adapter if ".lora_" not in k} == set(network(config).class_tables())
    assert len([k for k in adapter if ".lora_" in k]) == 2 * len(targets)
    merged = network(config).eval()
    merged.load_state_dict(merge(base, adapter, 2.0, "here"))
    with torch.no_grad():
        torch.testing.assert_close(merged(*inputs), adapted, rtol=1e-4, atol=1e-5)
        assert (adapted - before).abs().max() > 1e-3
    frozen = {plain_name(n): p for n, p in net.named_parameters() if not p.requires_grad}
    assert state_sha256(frozen, ADAPTER_BASE) == state_sha256({k: base[k] for k in frozen}, ADAPTER_BASE)
    assert flops_per_image(net) == flops_per_image(merged)
    assert set(depths(net).values()) <= set(depths(merged).values())


def test_adapters_of_another_network_are_named() -> None:
    state = {"x.weight": torch.zeros(3, 2)}
    product = {"x.lora_A.weight": torch.ones(1, 5), "x.lora_B.weight": torch.ones(3, 1)}
    with pytest.raises(UserError, match=r"x.lora_A.weight of the adapter in here does not fit x.weight of \(3, 2\)"):
        merge(state, product, 1.0, "here")
    with pytest.raises(UserError, match=r"has y.weight, for which this network has no place"):
        merge(state, {"y.weight": torch.zeros(1)}, 1.0, "here")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(rank=0), "rank of LoRA must be at least 1, got 0"),
        (LoRA(targets=["*.atention.*"]), r"lora.targets: nothing in this network is called '\*.atention.\*'"),
        (LoRA(train=["conv_oot.*"]), r"lora.train: .* is called 'conv_oot.\*'"),
    ],
)
def test_bad_adapters_are_sentences(lora: LoRA, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(simple_uvit.SimpleUViT(simple_uvit.TINY), lora)


# -- a run

PROCESS = GaussianProcess(schedule=Cosine())


@pytest.fixture
def released(tmp_path: Path, own_registry: None) -> Path:
    """A small network with weights in the folder `released`, and images of three classes in `images`."""
    registry.register_model("uvit_nano", simple_uvit.SimpleUViT, replace(simple_uvit.TINY, num_classes=5))
    network = perturbed(simple_uvit.SimpleUViT(replace(simple_uvit.TINY, num_classes=5)))
    names = ("ant", "bee", "cat", "dog", "eel")
    save_pretrained(network, tmp_path / "released", process=PROCESS, name="uvit_nano", class_names=names)
    write_images(tmp_path / "images", [f"{c}/{i}.png" for c in ("bee", "cow", "eel") for i in range(4)], (16, 16))
    return tmp_path / "released"


def fit(released: Path, run: str, steps: int, *more: str, lora: str = "{rank: 2, alpha: 4}") -> int:
    recipe = released.parent / "recipe.yaml"
    recipe.write_text(f"""
seed_everything: 0
model:
  network: uvit_nano
  weights: {released}
  network_args: {{num_classes: 3, classes: copy}}
  process: {{schedule: {{class_path: Cosine}}}}
  lora: {lora}
  optimizer: {{class_path: diffzoo.training.FusedAdamW, init_args: {{lr: 1.0e-2}}}}
data:
  class_path: ImageFolder
  init_args: {{path: {released.parent / "images"}, image_size: 16, batch_size: 4, num_workers: 0}}
trainer:
  accelerator: cpu
  callbacks: [{{class_path: EMA, init_args: {{decays: [0.5]}}}}]
""")
    steps_option = f"--trainer.max_steps={steps}"
    return main(["fit", "-c", str(recipe), "--run", str(released.parent / run), steps_option, *more])


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)


def test_a_run_holds_adapters_alone_resumes_exactly_and_merges(released: Path) -> None:
    folder = released.parent
    assert fit(released, "whole", 4) == 0
    assert fit(released, "parts", 2) == 0
    assert fit(released, "parts", 4, "--resume", "auto") == 0
    held = checkpoint(folder / "whole")
    again = checkpoint(folder / "parts")["state_dict"]
    assert all(torch.equal(v, again[k]) for k, v in held["state_dict"].items())
    assert all(".lora_" in k or k.endswith("classes.weight") for k in held["state_dict"])

    # merged by hand from the raw weights of the checkpoint and those it started from
    start = load_any(released).network.state_dict()
    tuned = load_any(folder / "whole", weights="raw").network.state_dict()
    raw: dict[str, Tensor] = {k.removeprefix("network."): v for k, v in held["state_dict"].items()}
    for name, value in tuned.items():
        place = name.removesuffix(".weight")
        if f"{place}.lora_A.default.weight" in raw:
            product = raw[f"{place}.lora_B.default.weight"] @ raw[f"{place}.lora_A.default.weight"]
            torch.testing.assert_close(value, start[name] + 2 * product)
        else:
            torch.testing.assert_close(value, raw.get(name, start[name]))
    assert (tuned["conditioning.classes.weight"][3] - start["conditioning.classes.weight"][5]).abs().max() < 0.05
    # classes of the same name began with their own row, the new one with the mean; Adam moves a row by 1e-2 a step
    rows = {0: start["conditioning.classes.weight"][1], 2: start["conditioning.classes.weight"][4],
            1: start["conditioning.classes.weight"][:5].mean(0)}  # fmt: skip
    for i, row in rows.items():
        assert (tuned["conditioning.classes.weight"][i] - row).abs().max() < 0.05

    # the folder `adapter` has the EMA; so has the run, by default
    averaged = load_any(folder / "whole")
    alone = load_any(folder / "whole" / "adapter")
    for name, value in averaged.network.state_dict().items():
        torch.testing.assert_close(value, alone.network.state_dict()[name], rtol=0, atol=0)
    assert any(not torch.equal(v, tuned[k]) for k, v in averaged.network.state_dict().items())
    assert averaged.class_names == alone.class_names == ("bee", "cow", "eel")
    assert alone.process == PROCESS
    with safe_open(str(folder / "whole" / "adapter" / "adapter.safetensors"), "pt") as file:
        assert all(".lora_" in k or k == "conditioning.classes.weight" for k in file.keys())  # noqa: SIM118
    assert main(["export", str(folder / "whole"), str(folder / "all.safetensors"), "--licence", "mit"]) == 0
    exported = load_any(folder / "all.safetensors").network.state_dict()
    assert all(torch.equal(v, exported[k]) for k, v in averaged.network.state_dict().items())


def test_what_adapters_belong_to_must_stay_as_it_was(released: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit(released, "run", 1) == 0
    assert fit(released, "run", 2, "--resume", "auto", lora="{rank: 3}") == 2
    assert "the adapters of the checkpoint have another rank, 2, than this run, 3" in capsys.readouterr().err
    other = perturbed(load_any(released).network)
    save_pretrained(other, released, process=PROCESS, name="uvit_nano")
    assert fit(released, "run", 2, "--resume", "auto") == 2
    assert "another base_sha256" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"trained on other weights than .*released now holds"):
        load_any(released.parent / "run")
    (released / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"belong to the weights .*released, which cannot be had"):
        load_any(released.parent / "run")


def test_adapters_without_weights_are_refused(released: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit(released, "run", 1, "--model.weights=null", "--model.network_args={num_classes: 3}") == 2
    assert "low-rank adapters belong to trained weights" in capsys.readouterr().err
