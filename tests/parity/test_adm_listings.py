"""Every released ADM file against its registered variant: names, shapes, counts, heads, both ways."""

import json
from pathlib import Path

import pytest
import torch
from golden_case import find_listings

from diffzoo.models.adm import CLASSIFIERS, VARIANTS, ADMClassifier, ADMClassifierConfig, ADMUNet, Attention
from diffzoo.zoo.converters.guided_diffusion import config_from_official, from_official, identify, to_official

pytestmark = pytest.mark.parity


def is_adm(path: Path) -> bool:
    flags = json.loads(path.read_text()).get("flags", {})
    return "classifier_width" in flags or "num_channels" in flags


LISTINGS = [path for path in find_listings() if is_adm(path)]


def test_there_are_listings() -> None:
    assert len({path.stem for path in LISTINGS}) >= 12


@pytest.mark.parametrize("path", LISTINGS, ids=lambda p: p.stem)
def test_listing_is_a_registered_variant_without_remainder(path: Path) -> None:
    listing = json.loads(path.read_text())
    config = config_from_official(listing["flags"])
    names = [name for name, known in {**VARIANTS, **CLASSIFIERS}.items() if known == config]
    assert names
    assert names[0] in identify({name: tuple(shape) for name, shape in listing["state"].items()})
    official = {name: torch.empty(shape, device="meta") for name, shape in listing["state"].items()}
    with torch.device("meta"):
        network = ADMClassifier(config) if isinstance(config, ADMClassifierConfig) else ADMUNet(config)
    ours = from_official(official, config)
    network.load_state_dict(ours, assign=True)
    assert network.num_parameters() == listing["n_params"]
    assert len(ours) == listing["n_state_tensors"]
    back = to_official(ours, config)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == listing["state"]


@pytest.mark.parametrize("path", [p for p in LISTINGS if "classifier" not in p.stem], ids=lambda p: p.stem)
def test_heads_of_every_attention_block(path: Path) -> None:
    listing = json.loads(path.read_text())
    config = config_from_official(listing["flags"])
    with torch.device("meta"):
        network = ADMUNet(config)  # type: ignore[arg-type]
    heads = {name: m.heads for name, m in network.named_modules() if isinstance(m, Attention)}
    # a mark of its own for each block shows where the converter puts it
    marks = {f"{name}.norm.bias": torch.tensor(count) for name, count in heads.items()}
    official = to_official({**network.state_dict(), **marks}, config)
    found = {k.removesuffix(".norm.bias"): int(v) for k, v in official.items() if k.endswith(".norm.bias")}
    assert found == listing["attention_heads_by_block"]
