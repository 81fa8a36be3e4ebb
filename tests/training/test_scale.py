"""Two processes compute what one does: DDP and FSDP2, through the real module, data and callbacks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parent))
import run_distributed_fit

from diffzoo import load_any
from diffzoo.errors import UserError
from diffzoo.models import entry, list_models
from diffzoo.training.module import DiffusionModule
from diffzoo.training.sharding import shard

pytestmark = [pytest.mark.filterwarnings("ignore")]
MUON = 0.4  # how far two processes may be apart, relative to the way that a matrix went
FAMILIES = sorted({entry(name).network.__name__ for name in list_models()})


def result(folder: Path, kind: str, family: str, stop: int = run_distributed_fit.STEPS) -> dict[str, Any]:
    return torch.load(folder / kind / f"{family}.{stop}.pt", weights_only=True)


def compare(folder: Path, kind: str, family: str) -> None:
    one, two = result(folder, "single", family), result(folder, kind, family)
    assert list(one["losses"]) == list(two["losses"]) == [1, 2, 3, 4]
    assert list(two["losses"].values()) == pytest.approx(list(one["losses"].values()), rel=3e-6)
    assert len(set(one["losses"].values())) == 4
    assert two["best"][0] == one["best"][0] > 0  # the held-out distance, on every process's share of the images
    assert two["best"][1] == pytest.approx(one["best"][1], rel=1e-3)
    kept = [load_any(folder / k / family / "best").network.state_dict() for k in ("single", kind)]
    assert all((kept[1][name] - v).abs().max() < 1e-5 for name, v in kept[0].items())
    assert list(one["state"]) == list(two["state"])  # clean names
    for name, value in one["state"].items():
        # steps are up to 1e-3 long; the eps of Adam keeps rounding of tiny gradients from becoming such steps
        torch.testing.assert_close(two["state"][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    for kind in ("single", "ddp"):
        run_distributed_fit.run(tmp_path, kind, ["SimpleUViT"])
    compare(tmp_path, "ddp", "SimpleUViT")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp+"])
def test_every_family_on_two_processes(kind: str, tmp_path: Path) -> None:
    families = FAMILIES if kind == "ddp" else [family for family in FAMILIES if family != "EDM2UNet"]
    for k in ("single", kind):
        run_distributed_fit.run(tmp_path, k, families)
    for family in families:
        compare(tmp_path, kind, family)


def test_a_parameter_of_one_number_is_refused_before_fsdp() -> None:
    with pytest.raises(UserError, match=r"EDM2UNet has parameters of a single number, such as .*gain.*strategy ddp"):
        shard(run_distributed_fit.network("EDM2UNet"), None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_muon_on_two_processes_differs_by_its_rounding(kind: str, tmp_path: Path) -> None:
    """timm orthogonalises in bfloat16: where a gradient has a low rank, a good part of the step is rounding noise."""
    for k in ("single", kind):
        run_distributed_fit.run(tmp_path, k, ["SimpleUViT"], optimizer="muon")
    one, two = result(tmp_path, "single", "SimpleUViT"), result(tmp_path, kind, "SimpleUViT")
    start = run_distributed_fit.network("SimpleUViT").state_dict()
    gaps = {n: (two["state"][n] - v).norm() / (v - start[n]).norm() for n, v in one["state"].items()}
    matrices = [float(gap) for n, gap in gaps.items() if one["state"][n].ndim > 1]
    assert max(matrices) < MUON
    assert list(two["losses"].values()) == pytest.approx(list(one["losses"].values()), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_on_two_processes_resumes_exactly(kind: str, tmp_path: Path) -> None:
    run_distributed_fit.run(tmp_path / "whole", kind, ["DiMR"])
    run_distributed_fit.run(tmp_path / "parts", kind, ["DiMR"], (2, 4))
    whole, parts = result(tmp_path / "whole", kind, "DiMR"), result(tmp_path / "parts", kind, "DiMR")
    assert list(parts["losses"]) == [3, 4]
    assert all(parts["losses"][step] == whole["losses"][step] for step in (3, 4))
    assert all(torch.equal(v, parts["state"][k]) for k, v in whole["state"].items())

    run = tmp_path / "parts" / kind / "DiMR"
    checkpoint = max((run / "checkpoints").glob("*.ckpt"))
    assert checkpoint.is_dir() == (kind == "fsdp")
    assert (run / "samples" / "final.png").exists() == (kind == "fsdp")
    for source in (run, checkpoint):
        loaded = load_any(source).network.state_dict()  # the EMA, from one file or from shards
        assert all(torch.equal(v, loaded[k]) for k, v in whole["state"].items())
    raw = load_any(run, weights="raw").network.state_dict()
    assert any(not torch.equal(v, raw[k]) for k, v in whole["state"].items())


@pytest.mark.slow
def test_compiled_blocks_leave_checkpoints_as_they_are(tmp_path: Path) -> None:
    torch._dynamo.reset()
    network = run_distributed_fit.network("UViTBao")
    names = [f"network.{name}" for name in network.state_dict()]
    module = DiffusionModule(network, compile=True)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": image, "label": torch.tensor([0, 1]), "index": torch.tensor([4, 5])}
    counters.clear()
    assert list(module.state_dict()) == names
    graphs = []
    for _ in range(3):
        loss = module.training_step(batch, 0)
        loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3  # nothing is compiled again
    assert list(module.state_dict()) == names
    assert all(p.grad is not None for p in network.parameters())


def test_more_devices_than_the_batch_divides_is_a_sentence_before_anything_starts() -> None:
    from diffzoo.recipe.command import Command

    with pytest.raises(
        UserError, match="the global batch of 24 does not divide among 5 ranks: set batch_size to 20 or 25"
    ):
        Command(
            ["fit", "--config=recipes/emoji/simple_uvit_xs_32.yaml", "--trainer.devices=5", "--trainer.accelerator=cpu"]
        )


def test_units_hold_nearly_all_parameters() -> None:
    """What is outside the blocks is gathered for the whole pass: it must be little at full size."""
    for name in (
        "simple_uvit_256",
        "simpler_uvit_p2_256",
        "uvit_bao_l_256",
        "dimr_xl_256",
        "adm_64",
        "simple_unet_256",
    ):
        found = entry(name)
        with torch.device("meta"):
            network = found.network(found.config)
        inside = {id(p): p.numel() for unit in network.fsdp_units() for p in unit.parameters()}
        share = sum(inside.values()) / network.num_parameters()
        assert share > 0.95, (name, share)
        assert all(isinstance(unit, nn.Module) for unit in network.fsdp_units())
