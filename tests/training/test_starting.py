"""What the module does with weights it starts from: another resolution, freezing, layer-wise learning rates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffzoo.errors import UserError
from diffzoo.models import registry, simple_uvit, uvit_bao
from diffzoo.process import Cosine, DiscreteBetas, GaussianProcess, Shifted
from diffzoo.record import to_plain
from diffzoo.training.lora import LoRA
from diffzoo.training.module import DiffusionModule
from diffzoo.zoo import save_pretrained


@pytest.fixture
def released(tmp_path: Path, own_registry: None) -> str:
    """Weights of a network for 16 px in a folder."""
    registry.register_model("uvit_nano", simple_uvit.SimpleUViT, simple_uvit.TINY)
    registry.register_model("bao_nano", uvit_bao.UViTBao, uvit_bao.TINY)
    network = simple_uvit.SimpleUViT(simple_uvit.TINY)
    save_pretrained(network, tmp_path, process=GaussianProcess(schedule=Cosine()), name="uvit_nano")
    return str(tmp_path)


def test_the_schedule_follows_the_resolution_where_it_is_asked_to(released: str) -> None:
    process = GaussianProcess(schedule=Cosine())
    options = {"weights": released, "process": process, "network_args": {"image_size": 32}}
    assert DiffusionModule("uvit_nano", **options).process == process
    moved = DiffusionModule("uvit_nano", shift_schedule=True, **options).process
    t = torch.tensor([0.2, 0.5, 0.9])
    # twice the pixels: a quarter of the signal-to-noise ratio at the same time
    torch.testing.assert_close(moved.logsnr(t), process.logsnr(t) - 2 * torch.log(torch.tensor(2.0)))
    assert to_plain(moved)["schedule"]["class"] == "diffzoo.process.Shifted"
    same = DiffusionModule("uvit_nano", weights=released, process=process, shift_schedule=True)
    assert same.process == process
    options["process"] = replace(process, schedule=DiscreteBetas("cosine"))
    with pytest.raises(UserError, match="a table of betas cannot be shifted"), pytest.warns(match="another schedule"):
        DiffusionModule("uvit_nano", shift_schedule=True, **options)


def test_shifting_twice_adds_up() -> None:
    once = Shifted(Shifted(Cosine(), 16, 32), 32, 64)
    t = torch.tensor([0.1, 0.7])
    torch.testing.assert_close(once.logsnr(t), Shifted(Cosine(), 16, 64).logsnr(t))


def test_weights_of_another_architecture_are_refused(released: str) -> None:
    with pytest.raises(UserError, match=r"expected weights of bao_nano, a UViTBao, in .*, got those of uvit_nano"):
        DiffusionModule("bao_nano", weights=released)


def test_dropout_and_recomputation_are_on_where_weights_were_loaded(released: str) -> None:
    module = DiffusionModule("uvit_nano", weights=released, network_args={"dropout": 0.5}, grad_checkpointing=True)
    assert all(m.training for m in module.network.modules())
    calls = []
    for unit in module.network.units():
        unit.register_forward_pre_hook(lambda *_: calls.append(1))
    x, t, label = torch.rand(2, 3, 16, 16), torch.tensor([0.3, 0.6]), {"label": torch.tensor([0, 1])}
    losses = [module.losses(x, torch.zeros_like(x), t, module.condition(label, None)).mean() for _ in range(2)]
    assert losses[0] == losses[1]  # the output starts at zero
    losses[0].backward()
    assert len(calls) == 3 * len(list(module.network.units()))


def test_frozen_parameters_stay_and_rates_follow_depth(released: str) -> None:
    module = DiffusionModule("uvit_nano", weights=released, freeze="first_half", layer_decay=0.5)
    optimizer = module.configure_optimizers()
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.network.parameters() if p.requires_grad}
    assert 0 < len(held) < len(list(module.network.parameters()))
    rates = sorted({g["lr"] for g in optimizer.param_groups}, reverse=True)
    assert rates[:3] == pytest.approx([1e-4, 5e-5, 2.5e-5])


def test_adapters_are_not_sharded(released: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = DiffusionModule("uvit_nano", weights=released, lora=LoRA())
    monkeypatch.setattr(DiffusionModule, "device_mesh", {"data_parallel": None})
    with pytest.raises(UserError, match="not trained on sharded networks"):
        module.configure_model()


def test_adapters_leave_nothing_to_freeze(released: str) -> None:
    with pytest.raises(UserError, match="leave out freeze and layer_decay"):
        DiffusionModule("uvit_nano", weights=released, lora=LoRA(), freeze="blocks")
