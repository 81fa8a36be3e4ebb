"""Names, shapes, parameter counts and FLOPs of the full-size official models, against the registered variants."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_case import find_listings
from official_configs import dimr_config, dit_config, pixnerd_config, uvit_config
from torch.utils.flop_counter import FlopCounterMode

from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.models.dimr import VARIANTS as DIMR_VARIANTS
from diffzoo.models.dimr import DiMR
from diffzoo.models.dit import VARIANTS as DIT_VARIANTS
from diffzoo.models.dit import DiT
from diffzoo.models.edm2 import VARIANTS as EDM2_VARIANTS
from diffzoo.models.edm2 import EDM2UNet
from diffzoo.models.pixnerd import VARIANTS as PIXNERD_VARIANTS
from diffzoo.models.pixnerd import PixNerd
from diffzoo.models.uvit_bao import VARIANTS as UVIT_VARIANTS
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.typing import Condition
from diffzoo.zoo.converters import dimr, dit, edm2, pixnerd, uvit_bao

pytestmark = pytest.mark.parity

# LightningDiT's size is in its name
SIZES = {
    "LightningDiT-B-1-256": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "LightningDiT-XL-1-256": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def test_transformer_listings_are_registered_variants_without_remainder() -> None:
    """DiT, SiT, REPA, JiT, LightningDiT, DiT-DH: trained parameters exact, fixed tables aside."""
    seen = set()
    for path in find_listings():
        listing = json.loads(path.read_text())
        kind = listing.get("model", "").split("-")[0]
        if kind not in ("DiT", "SiT", "REPA", "JiT", "LightningDiT", "RAE"):
            continue
        config = dit_config({**SIZES.get(listing["model"], {}), **listing["constructor"]}, kind)
        known = [v.override(dropout=0.0, projector_width=config.projector_width) for v in DIT_VARIANTS.values()]
        assert config in known, listing["model"]
        official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
        with torch.device("meta"):
            network = DiT(config)
        ours = dit.from_official(official, config)
        network.load_state_dict(ours, assign=True)
        assert network.num_parameters() == listing["n_trained_params"]
        back = dit.to_official(ours, config)
        assert official.keys() - back.keys() == set(listing["buffers"])
        assert all(tuple(back[name].shape) == tuple(official[name].shape) for name in back)
        seen.add(listing["model"])
    assert len(seen) >= 23


def test_edm2_listings_are_registered_variants_without_remainder() -> None:
    seen = set()
    for path in find_listings():
        listing = json.loads(path.read_text())
        parts = listing.get("model", "").split("-")
        if parts[0] != "edm2":
            continue
        config = EDM2_VARIANTS["_".join(["edm2", parts[2], parts[1].removeprefix("img"), *parts[3:]])]
        official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
        with torch.device("meta"):
            network = EDM2UNet(config)
        ours = edm2.from_official(official, config)
        network.load_state_dict(ours, assign=True)
        assert network.num_parameters() == listing["n_params"]
        assert shapes(edm2.to_official(ours, config)) == shapes(official)
        seen.add(listing["model"])
    assert len(seen) >= 12


def test_pixnerd_listing_is_a_registered_variant_without_remainder() -> None:
    (path,) = {p.name: p for p in find_listings() if json.loads(p.read_text()).get("model") == "PixNerd-XL-16"}.values()
    listing = json.loads(path.read_text())
    config = PIXNERD_VARIANTS["pixnerd_xl_256"]
    assert pixnerd_config(listing["constructor"], 256) == config
    official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
    with torch.device("meta"):
        network = PixNerd(config)
    ours = pixnerd.from_official(official, config)
    network.load_state_dict(ours, assign=True)
    assert network.num_parameters() == listing["n_params"]
    assert shapes(pixnerd.to_official(ours, config)) == shapes(official)


def family(listing: dict[str, Any]) -> tuple[ModuleType, Callable[..., Any], type[Network], dict[str, Any]] | None:
    config = listing.get("config", {})
    if "stage_configs" in config:
        return dimr, dimr_config, DiMR, DIMR_VARIANTS
    return (uvit_bao, uvit_config, UViTBao, UVIT_VARIANTS) if {"embed_dim", "patch_size"} <= config.keys() else None


def listings() -> list[Path]:
    return [p for p in find_listings() if family(json.loads(p.read_text()))]


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_there_are_listings() -> None:
    assert len(listings()) >= 12


@pytest.mark.parametrize("path", listings(), ids=lambda p: p.stem)
def test_listing_maps_both_ways_without_remainder(path: Path) -> None:
    listing = json.loads(path.read_text())
    converter, read_config, network_class, variants = family(listing)  # type: ignore[misc]
    config = read_config(listing["config"])
    # CIFAR-10's and CelebA's networks, say, must each be some registered variant
    assert config in variants.values()
    official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
    with torch.device("meta"):
        network = network_class(config)
    ours = converter.from_official(official, config)
    assert shapes(ours) == shapes(network.state_dict())
    back = converter.to_official(ours, config)
    assert shapes(back) == shapes(official)
    assert all(back[name] is official[name] for name in official)
    assert network.num_parameters() == listing["n_params"]
    broken = dict(official)
    name = sorted(broken)[0]
    broken[name + "x"] = broken.pop(name)
    with pytest.raises(UserError, match="unknown"):
        converter.from_official(broken, config)


@pytest.mark.parametrize("path", listings(), ids=lambda p: p.stem)
def test_forward_flops_are_the_official_ones(path: Path) -> None:
    listing = json.loads(path.read_text())
    _, read_config, network_class, _ = family(listing)  # type: ignore[misc]
    config = read_config(listing["config"])
    with torch.device("meta"):
        network = network_class(config).eval()
        z, level = torch.empty(1, *listing["input"]), torch.empty(1)
        label = torch.zeros(1, dtype=torch.long) if config.num_classes else None
        text = torch.empty(1, 77, config.text_width) if config.text_width else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.training_outputs(z, level, Condition(label=label, text=text))
    assert counter.get_total_flops() == listing["flops_per_image"] - saved(config)


def saved(config: Any) -> int:
    """The official U-ViT also applies its output layer to the tokens that it then drops."""
    if not isinstance(config, UViTBaoConfig):
        return 0
    return 2 * config.extras * config.width * config.patch**2 * config.in_channels
