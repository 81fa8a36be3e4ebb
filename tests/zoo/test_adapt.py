"""Weights that start a network of other classes or another resolution."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor

from diffzoo import create_model
from diffzoo.errors import UserError
from diffzoo.models import registry, uvit_bao
from diffzoo.models.base import Network
from diffzoo.typing import Condition
from diffzoo.zoo import locate, save_pretrained
from diffzoo.zoo.adapt import copy_classes, resample_positions

FAMILIES = {f"{name.lower()}_tiny": made for name, made in networks.FAMILIES.items()}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _registered(own_registry: None) -> None:
    for name, (network, config) in FAMILIES.items():
        registry.register_model(name, network, config)


def saved(name: str, folder: Path, class_names: tuple[str, ...] = (), **overrides: Any) -> Network:
    """A network with random weights, in the published form in `folder`."""
    network, config = FAMILIES[name]
    torch.manual_seed(0)
    made = networks.perturbed(network(config.override(**overrides))).eval()
    save_pretrained(made, folder, name=name, class_names=class_names)
    return made


def output(network: Network, z: Tensor, label: int | None) -> Tensor:
    cond = None if label is None else Condition(label=torch.full((len(z),), label))
    with torch.no_grad():
        return network(z, torch.linspace(0.2, 0.8, len(z)), cond)


@every_family
@pytest.mark.parametrize("policy", ["mean", "random"])
def test_a_network_without_classes_gets_some(name: str, policy: Any, tmp_path: Path) -> None:
    old = saved(name, tmp_path, num_classes=0)
    new = create_model(name, pretrained=tmp_path, num_classes=4, null_class=True, classes=policy)
    z = torch.randn(2, old.config.in_channels, old.config.image_size, old.config.image_size)
    before, null = output(old, z, None), output(new, z, 4)
    if name not in (
        "dimr_tiny",
        "edm2unet_tiny",
        "uvitbao_tiny",
    ):  # where the class is added to the conditioning, nothing has changed
        torch.testing.assert_close(null, before)
        same = torch.allclose(output(new, z, 1), before)
        assert same == (policy == "mean")
    else:  # a token that is zero, or a mean with zero
        assert (null - before).norm() < 0.5 * before.norm()
    with pytest.raises(UserError, match="classes='mean' or 'random'"):
        create_model(name, pretrained=tmp_path, num_classes=1, null_class=True, classes="copy", class_names=["a"])


@pytest.mark.parametrize("class_names", ["ab", ["a"], [1, 2], []])
def test_class_names_are_as_many_texts_as_classes(class_names: Any) -> None:
    with pytest.raises(UserError, match="expected a list of 2 class_names, one per class, got"):
        create_model("simple_uvit_xs_32.emoji", num_classes=2, classes="mean", class_names=class_names)


@every_family
def test_another_resolution_keeps_all_but_the_positions(name: str, tmp_path: Path) -> None:
    old = saved(name, tmp_path)
    size = 2 * old.config.image_size
    new = create_model(name, pretrained=tmp_path, image_size=size)
    z = torch.randn(1, new.config.in_channels, size, size)
    assert output(new, z, 0).shape[2:] == z.shape[2:]
    tables = new.position_tables()
    before, after = old.state_dict(), new.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k not in tables)
    assert {k for k in before if after[k].shape != before[k].shape} == set(tables)
    assert new.metadata.config.image_size == size


def test_positions_follow_the_place_in_the_image() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 8), indexing="ij")
    smooth = torch.stack([rows, (3 * columns).sin()], -1).reshape(1, 64, 2)
    table = torch.cat([torch.full((1, 2, 2), 7.0), smooth], 1)
    for size in (16, 4):
        made = resample_positions(table, (2, 8, 8), (2, size, size))
        assert torch.equal(made[:, :2], table[:, :2])
        centres = (np.arange(size) + 0.5) / size * 8 - 0.5  # in units of the old places
        inside = (centres > 0.5) & (centres < 6.5)
        got = made[0, 2:].reshape(size, size, 2).numpy()[inside][:, inside]
        assert np.abs(got[:, 0, 0] - centres[inside] / 7).max() < 0.01
        assert np.abs(got[0, :, 1] - np.sin(3 * centres[inside] / 7)).max() < 0.03
    assert torch.equal(resample_positions(table, (2, 8, 8), (3, 8, 8))[:, 1:], table)
    assert torch.equal(resample_positions(table, (2, 8, 8), (1, 8, 8)), table[:, 1:])


def test_another_name_of_the_family_may_differ_in_size_alone(tmp_path: Path) -> None:
    small = saved("uvitbao_tiny", tmp_path)
    registry.register_model("bao_large", uvit_bao.UViTBao, replace(uvit_bao.TINY, image_size=32))
    registry.register_model("bao_deep", uvit_bao.UViTBao, replace(uvit_bao.TINY, depth=7))
    large = create_model("bao_large", pretrained=tmp_path)
    assert large.config.image_size == 32
    assert large.metadata.name == "bao_large"
    assert torch.equal(large.head.weight, small.head.weight)
    with pytest.raises(UserError, match="got those of uvitbao_tiny, which differs in depth"):
        create_model("bao_deep", pretrained=tmp_path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    saved("uvitbao_tiny", tmp_path)
    with pytest.raises(
        UserError, match=r"expected weights of dimr_tiny, a DiMR, in .*, got those of uvitbao_tiny, a UViT"
    ):
        create_model("dimr_tiny", pretrained=tmp_path)


@every_family
def test_rows_are_copied_once_the_names_are_known(name: str, tmp_path: Path) -> None:
    names = tuple("abcdefghij"[: FAMILIES[name][1].num_classes])
    saved(name, tmp_path, names, null_class=True)
    wanted = [names[1], "new", names[0]]
    policy: Any = {"num_classes": 3, "pretrained": tmp_path}
    later = create_model(name, classes="mean", **policy)
    assert copy_classes(later, locate(tmp_path), wanted) == [names[1], names[0]]
    atonce = create_model(name, classes="copy", class_names=wanted, **policy)
    table = atonce.state_dict()[atonce.class_tables()[0]]
    assert not torch.equal(table[0], table[1])
    assert all(
        torch.equal(a, b) for a, b in zip(later.state_dict().values(), atonce.state_dict().values(), strict=True)
    )
