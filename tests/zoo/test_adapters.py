"""Adapters on the Hub: up alone, down to a network that computes what was trained; or whole."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub

from diffzoo import load_any, pull, push_to_hub
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.process import Eps, GaussianProcess
from diffzoo.record import to_plain
from diffzoo.tensors import ADAPTER_BASE, state_sha256
from diffzoo.zoo import save_pretrained

# the client's own use of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
LAYER = "stages.0.blocks.0.attention.qkv"


def run_with_adapters(tiny: Network, base: str, folder: Path) -> Path:
    """A run's checkpoint with adapters of one layer and a class table."""
    (folder / "checkpoints").mkdir(parents=True)
    out, width = tiny.state_dict()[f"{LAYER}.weight"].shape
    state = {
        f"network.{LAYER}.lora_A.default.weight": torch.randn(2, width),
        f"network.{LAYER}.lora_B.default.weight": torch.randn(out, 2),
        "network.stages.0.class_table.weight": torch.randn(11, width),
    }
    frozen = {n: p for n, p in tiny.named_parameters() if n != "stages.0.class_table.weight"}
    record = {
        "version": "0.1.0",
        "model": {"name": "dimr_tiny", "family": "DiMR", "config": to_plain(tiny.config)},
        "process": to_plain(GaussianProcess(prediction=Eps())),
        "class_names": [f"cat {i}" for i in range(10)],
        "adapter": {"base": base, "rank": 2, "alpha": 3.0, "base_sha256": state_sha256(frozen, ADAPTER_BASE)},
    }
    torch.save({"state_dict": state, "diffzoo": record}, folder / "checkpoints" / "step_00000007.ckpt")
    return folder


def test_adapters_go_up_alone_and_come_down_merged(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path / "base", process=GaussianProcess(prediction=Eps()), name="dimr_tiny", licence="mit")
    push_to_hub(tmp_path / "base", "tester/base", licence="mit", dataset="none")
    run = run_with_adapters(tiny, "hf-hub:tester/base", tmp_path / "run")
    expected = load_any(run).network.state_dict()
    assert not torch.equal(expected[f"{LAYER}.weight"], tiny.state_dict()[f"{LAYER}.weight"])

    assert main(["push", str(run), "tester/cats", "--licence", "mit"]) == 0
    found = load_any("hf-hub:tester/cats")
    assert all(torch.equal(v, expected[k]) for k, v in found.network.state_dict().items())
    assert found.class_names[3] == "cat 3"
    folder = pull("tester/cats", tmp_path / "pulled")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter.safetensors", "config.json"]
    assert all(torch.equal(v, expected[k]) for k, v in load_any(folder).network.state_dict().items())
    assert push_to_hub(folder, "tester/again", dry_run=True).count("adapter.safetensors") == 1

    assert main(["push", str(folder), "tester/whole", "--licence", "mit", "--merge"]) == 0
    whole = pull("tester/whole", tmp_path / "whole")
    assert (whole / "model.safetensors").is_file()
    assert not (whole / "adapter.safetensors").exists()
    assert "adapter" not in json.loads((whole / "config.json").read_text())
    merged = load_any(whole).network.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in merged.items())


def test_adapters_of_weights_that_nobody_else_has_need_merging(tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path / "base", process=GaussianProcess(prediction=Eps()), name="dimr_tiny")
    run = run_with_adapters(tiny, str(tmp_path / "base"), tmp_path / "run")
    with pytest.raises(UserError, match=r"which others do not have: publish that first .* or publish whole .* --merge"):
        push_to_hub(run, "tester/cats", licence="mit", dry_run=True)
    shown = push_to_hub(run, "tester/cats", licence="mit", dry_run=True, merge=True)
    assert "model.safetensors" in shown
