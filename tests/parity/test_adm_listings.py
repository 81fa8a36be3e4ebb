"""Every released file of ADM's network against its registered variant: names, shapes, counts, heads, both ways."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_case import find_listings
from official_configs import adm_config

from diffzoo.models.adm import CLASSIFIERS, VARIANTS, ADMClassifier, ADMClassifierConfig, ADMUNet, Attention
from diffzoo.zoo.converters import consistency_models, edm, guided_diffusion
from diffzoo.zoo.converters.guided_diffusion import to_official

pytestmark = pytest.mark.parity

MEMBERS = {**VARIANTS, **CLASSIFIERS}


def flags_of(listing: dict[str, Any]) -> dict[str, Any]:
    return listing.get("flags") or listing.get("constructor") or {}


def is_adm(path: Path) -> bool:
    flags = flags_of(json.loads(path.read_text()))
    return "classifier_width" in flags or "num_channels" in flags or flags.get("model_type") == "DhariwalUNet"


LISTINGS = [path for path in find_listings() if is_adm(path)]


def member(listing: dict[str, Any]) -> tuple[str, ModuleType]:
    """The registered name of a listing, and the converter of its file."""
    flags, source = dict(flags_of(listing)), listing["official_source"]
    if "NVlabs/edm" in source:
        return "edm_64", edm
    cm = "consistency_models" in source
    if cm:
        flags["use_new_attention_order"] = True  # whatever the official flag says
    config = adm_config(flags)
    # dropout is no part of a file
    names = [name for name, known in MEMBERS.items() if known.override(dropout=0.0) == config.override(dropout=0.0)]
    assert names
    return names[0], consistency_models if cm else guided_diffusion


def test_there_are_listings() -> None:
    assert len({path.stem for path in LISTINGS}) >= 20


@pytest.mark.parametrize("path", LISTINGS, ids=lambda p: p.stem)
def test_listing_is_a_registered_variant_without_remainder(path: Path) -> None:
    listing = json.loads(path.read_text())
    name, converter = member(listing)
    config = MEMBERS[name]
    official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
    with torch.device("meta"):
        network = ADMClassifier(config) if isinstance(config, ADMClassifierConfig) else ADMUNet(config)
    ours = converter.from_official(official, config)
    network.load_state_dict(ours, assign=True)
    assert network.num_parameters() == listing["n_params"]
    constants = listing.get("buffers", [])
    assert len(ours) == listing["n_state_tensors"] - len(constants)
    back = converter.to_official(ours, config)
    want = {name: shape for name, shape in listing["state"].items() if name not in constants}
    assert {name: list(tensor.shape) for name, tensor in back.items()} == want


@pytest.mark.parametrize(
    "path",
    [p for p in LISTINGS if "heads_by_block" in p.read_text() and "classifier" not in p.stem],
    ids=lambda p: p.stem,
)
def test_heads_of_every_attention_block(path: Path) -> None:
    listing = json.loads(path.read_text())
    config = MEMBERS[member(listing)[0]]
    with torch.device("meta"):
        network = ADMUNet(config)  # type: ignore[arg-type]
    heads = {name: m.heads for name, m in network.named_modules() if isinstance(m, Attention)}
    # a mark of its own for each block shows where the converter puts it
    biases = {name: network.get_submodule(name).norm.bias for name in heads}
    marks = {f"{name}.norm.bias": torch.full(biases[name].shape, n, device="cpu") for name, n in heads.items()}
    official = to_official({**network.state_dict(), **marks}, config)
    found = {k.removesuffix(".norm.bias"): int(v[0]) for k, v in official.items() if v.device.type == "cpu"}
    assert found == listing["attention_heads_by_block"]
