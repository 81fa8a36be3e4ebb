"""Freeze presets and layer-wise learning rates, for every family."""

import pytest
import torch
from networks import FAMILIES
from torch import nn

from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.models.summary import example_inputs
from diffzoo.training.freezing import depths, freeze, learning_rate_shares
from diffzoo.training.optimizers import FusedAdamW, TimmOptimizer, parameter_groups, scale_learning_rates

every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> Network:
    network, config = FAMILIES[family]
    return network(config)


def order(network: Network) -> list[nn.Module]:
    """The blocks in the order of a real pass: what `depths` finds without data."""
    seen: list[nn.Module] = []
    hooks = [u.register_forward_pre_hook(lambda m, *_: seen.append(m)) for u in network.units()]
    with torch.no_grad():
        network.eval().training_outputs(*example_inputs(network.config, 1, "cpu"))
    for hook in hooks:
        hook.remove()
    return seen


@every_family
def test_depth_is_the_order_in_which_blocks_run(family: str) -> None:
    network = make(family)
    blocks = order(network)
    assert len(blocks) == len(list(network.units())) > 1
    place = {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    at = depths(network)
    for name, parameter in network.named_parameters():
        if id(parameter) in place:
            assert at[name] == place[id(parameter)], name
    first, last = {n for n, d in at.items() if d == 0}, {n for n, d in at.items() if d == len(blocks) + 1}
    assert any("in" in n or "patch" in n for n in first)
    assert any(n.startswith(("conv_out", "out.", "head", "smooth", "stages.1.head")) for n in last)


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_freeze_what_they_say(family: str) -> None:
    inside = {n for n, p in make(family).named_parameters()}
    trained = {}
    for preset in ("blocks", "first_half", "all_but_classes"):
        network = make(family)
        frozen = freeze(network, preset)
        trained[preset] = {n for n, p in network.named_parameters() if p.requires_grad}
        assert trained[preset] == inside - set(frozen)
    network = make(family)
    tables = set(network.class_tables())
    assert tables
    assert trained["all_but_classes"] == tables
    assert all(tables < kept for preset, kept in trained.items() if preset != "all_but_classes")
    of_blocks = {id(p) for u in network.units() for p in u.parameters()}
    assert trained["blocks"] == {n for n, p in network.named_parameters() if id(p) not in of_blocks}
    blocks = order(network)
    names = {id(p): n for n, p in network.named_parameters()}
    assert not {names[id(p)] for p in blocks[0].parameters()} & trained["first_half"]
    assert {names[id(p)] for p in blocks[-1].parameters()} <= trained["first_half"]


def test_patterns_freeze_by_name_and_bad_ones_are_sentences() -> None:
    network = make("SimpleUViT")
    assert set(freeze(network, ["conv_in.*", "conditioning.classes.*"])) == {
        "conv_in.weight", "conv_in.bias", "conditioning.classes.weight",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"freeze: nothing in this network is called 'conv_im\.\*'"):
        freeze(network, ["conv_im.*"])
    with pytest.raises(UserError, match="did you mean 'blocks'"):
        freeze(network, "block")
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(network, ["*"])


@every_family
def test_learning_rates_fall_towards_the_input_and_decay_rules_stay(family: str) -> None:
    network = make(family)
    shares = learning_rate_shares(network, 0.5)
    groups = parameter_groups(network, shares)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in network.parameters())
    names = {id(p): n for n, p in network.named_parameters()}
    exempt = {names[id(p)] for g in groups if g.get("weight_decay") == 0 for p in g["params"]}
    assert exempt == network.no_weight_decay()

    optimizer = scale_learning_rates(FusedAdamW(groups, lr=1e-2, weight_decay=0.1))
    rate = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    at, n = depths(network), len(list(network.units()))
    for name, value in rate.items():
        expected = 1e-2 if name in network.class_tables() else 1e-2 * 0.5 ** (n + 1 - at[name])
        assert value == pytest.approx(expected), name
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    assert schedule.get_last_lr() == pytest.approx([1e-2 * g["lr_share"] * 0.5 for g in groups])


def test_other_optimizers_keep_the_shares_too() -> None:
    network = make("UViTBao")
    groups = parameter_groups(network, learning_rate_shares(network, 0.8))
    made = scale_learning_rates(TimmOptimizer(groups, "lion", lr=1e-3))
    assert len({g["lr"] for g in made.param_groups}) == len(list(network.units())) + 2
    with pytest.raises(UserError, match=r"layer_decay must lie in \(0, 1\], got 1.5"):
        learning_rate_shares(network, 1.5)
