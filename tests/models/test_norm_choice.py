"""The norm of the blocks as a choice of the config: every family that has a norm of its own and takes others."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import perturbed
from torch import Tensor, nn

from diffzoo import create_model, load_any
from diffzoo.errors import UserError
from diffzoo.models import Network, adm, simple_unet, simple_uvit, simpler_uvit, uvit_bao
from diffzoo.models.base import Config
from diffzoo.models.summary import describe, example_inputs
from diffzoo.nn.norms import MapNorm
from diffzoo.nn.time_dependent import NORMS, TimeDependentParameter
from diffzoo.process import GaussianProcess
from diffzoo.record import from_plain, to_plain
from diffzoo.typing import Condition
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.converters import guided_diffusion
from diffzoo.zoo.converters import uvit_bao as official_uvit

_FINE, _COARSE = simple_uvit.TINY.levels
FAMILIES: dict[str, tuple[type[Network], Config]] = {
    "SimpleUNet": (simple_unet.SimpleUNet, simple_unet.TINY),
    "SimpleUViT": (simple_uvit.SimpleUViT, simple_uvit.TINY),
    "SimpleUViT-text": (  # transformers with skips and captions
        simple_uvit.SimpleUViT,
        replace(simple_uvit.TINY_TEXT, levels=(replace(_FINE, attention=True, heads=2), _COARSE)),
    ),
    "SimplerUViT": (simpler_uvit.SimplerUViT, simpler_uvit.TINY),
    "UViTBao": (uvit_bao.UViTBao, uvit_bao.TINY),
    "UViTBao-text": (uvit_bao.UViTBao, uvit_bao.TINY_TEXT),
    "ADMUNet": (adm.ADMUNet, adm.TINY),
    "ADMClassifier": (adm.ADMClassifier, adm.TINY_CLASSIFIER),
}
# noise levels that time-dependent norms read as -1, 0 and 1
LEVELS = {"Simp": (-10.0, 0.0, 10.0), "UViT": (0.0, 500.0, 1000.0), "ADMU": (0.0, 499.5, 999.0)}
LEVELS["ADMC"] = LEVELS["ADMU"]


def offered(family: str) -> list[str]:
    return [n for n in NORMS if n != "ada_rmsn" or family.startswith("UViT")]


every_family = pytest.mark.parametrize("family", FAMILIES)
every_norm = pytest.mark.parametrize(("family", "norm"), [(f, n) for f in FAMILIES for n in offered(f)])


def make(family: str, norm: str | None = None) -> Network:
    """A tiny network in which every parameter matters; None: the default norm."""
    network, config = FAMILIES[family]
    return perturbed(network(config if norm is None else config.override(norm=norm))).eval()


def inputs(family: str, net: Network) -> tuple[Tensor, Tensor, Condition | None]:
    low, middle, high = LEVELS[family[:4]]
    z, _, cond = example_inputs(net.config, 2, "cpu")
    return z, torch.tensor([(low + middle) / 2, high]), cond


def deafen(net: Network) -> None:
    """Let the network hear of the noise level through its norms alone."""
    if isinstance(net, uvit_bao.UViTBao):
        net._time_token = lambda level: torch.ones(len(level), 1, net.config.width)  # type: ignore[method-assign]
        return
    listener = net.time if hasattr(net, "time") else net.conditioning
    listener.register_forward_hook(lambda _module, _args, out: torch.ones_like(out))


def standard_norms(net: Network) -> set[str]:
    return {n for n, m in net.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}


# -- the default


@pytest.mark.parametrize(
    ("family", "tensors", "names", "weights", "draw"),
    [
        ("SimpleUNet", 173, "6fd1a57bf76a3636", 51523.278020, 0.036825),
        ("SimpleUViT", 82, "4ef28e04345ff01d", 7434.839013, 0.270515),
        ("SimplerUViT", 105, "85e78b8a8c9eadd8", 13790.256366, 0.235287),
        ("UViTBao", 69, "a938ea8d034760a8", 11479.004535, 0.816795),
        ("ADMUNet", 145, "047f00a40bb503a0", 124913.436368, 0.921721),
        ("ADMClassifier", 77, "fbeea55883aecb89", 31827.192574, 0.417034),
    ],
)
def test_default_network_is_the_one_before_there_was_a_choice(
    family: str, tensors: int, names: str, weights: float, draw: float
) -> None:
    """Recorded with the code that had no `norm`: names and shapes in order, first weights, the generator after them."""
    network, config = FAMILIES[family]
    state = network(config).state_dict()
    after = float(torch.rand(3)[0])
    listing = "\n".join(f"{k} {tuple(v.shape)}" for k, v in state.items())
    assert len(state) == tensors
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == names
    assert sum((i + 1) * float(v.double().sum()) for i, v in enumerate(state.values())) == pytest.approx(weights)
    assert after == pytest.approx(draw, abs=1e-6)
    assert make(family).no_weight_decay() == set()


@every_family
def test_a_config_without_the_field_is_the_default(family: str) -> None:
    config = FAMILIES[family][1]
    older = to_plain(config)
    assert older.pop("norm") == "standard"
    assert from_plain(type(config), older) == config


# -- other norms


@every_norm
def test_all_norms_of_the_blocks_and_no_others_change(family: str, norm: str) -> None:
    before, after = make(family), make(family, norm)
    inside = {
        f"{name}.{inner}"
        for name, unit in before.named_modules()
        if isinstance(unit, before.unit_types)
        for inner in standard_norms(unit)
    }
    assert standard_norms(after) == standard_norms(before) - inside
    maps = {f"{n}.norm": n for n, m in after.named_modules() if isinstance(m, MapNorm)}
    assert {maps.get(n, n) for n, m in after.named_modules() if type(m) is NORMS[norm]} == inside
    rest = {n: tuple(p.shape) for n, p in before.named_parameters() if n.rpartition(".")[0] not in inside}
    assert rest.items() <= {n: tuple(p.shape) for n, p in after.named_parameters()}.items()


@every_norm
def test_gradients_reach_every_parameter(family: str, norm: str) -> None:
    net = make(family, norm)
    z, level, cond = inputs(family, net)
    y = net(z, level, cond)
    assert y.shape == make(family)(z, level, cond).shape
    assert y.isfinite().all()
    (y * torch.randn_like(y)).sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert idle == []


@every_family
@pytest.mark.parametrize("norm", ["standard", "td_ln", "td_rmsn", "rmsn"])
def test_time_dependent_norms_carry_the_noise_level_by_themselves(family: str, norm: str) -> None:
    net = make(family, norm)
    deafen(net)
    z, level, cond = inputs(family, net)
    with torch.no_grad():
        change = (net(z, level.flip(0), cond) - net(z, level, cond)).flatten(1).abs().amax(1)
    if norm.startswith("td_"):
        assert (change > 1e-3).all()
    else:
        assert (change == 0).all()


@every_family
@pytest.mark.parametrize("part", ["slope", "shift", "high", "low"])
def test_output_depends_on_the_parameters_of_the_gates(family: str, part: str) -> None:
    net = make(family, "td_ln")
    z, level, cond = inputs(family, net)
    with torch.no_grad():
        y = net(z, level, cond)
        for module in net.modules():
            if isinstance(module, TimeDependentParameter):
                getattr(module, part).add_(0.5)
        assert (net(z, level, cond) - y).abs().amax() > 1e-3


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_norms_read_the_noise_level_between_minus_one_and_one(family: str, dtype: torch.dtype) -> None:
    net, seen = make(family, "td_ln"), []
    for module in net.modules():
        if isinstance(module, NORMS["td_ln"]):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    z, _, cond = example_inputs(net.config, 3, "cpu")
    level = torch.tensor(LEVELS[family[:4]]).to(dtype)
    with torch.no_grad():
        net(z, level, cond)
    assert len(seen) == len(net.no_weight_decay()) // 4
    for tau in seen:
        torch.testing.assert_close(tau, torch.tensor([-1.0, 0.0, 1.0]), atol=2e-3, rtol=0)


def test_norms_read_the_range_that_the_config_states() -> None:
    net, seen = simple_unet.SimpleUNet(simple_unet.TINY.override(norm="td_ln", noise_range=(-20.0, 0.0))), []
    net.middle.blocks[0].res.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    z, _, cond = example_inputs(net.config, 2, "cpu")
    net(z, torch.tensor([-20.0, 5.0]), cond)
    torch.testing.assert_close(seen[0], torch.tensor([-1.0, 1.5]))


@every_family
def test_gates_are_exempt_from_weight_decay(family: str) -> None:
    net = make(family, "td_ln")
    exempt = net.no_weight_decay()
    assert exempt == {n for n, _ in net.named_parameters() if n.endswith((".slope", ".shift"))}
    assert len(exempt) == 2 * sum(isinstance(m, TimeDependentParameter) for m in net.modules()) > 0


@every_family
def test_checkpointing_passes_the_noise_level_on(family: str) -> None:
    net, found = make(family, "td_ln").train(), []
    z, level, cond = inputs(family, net)
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        torch.manual_seed(3)
        net(z, level, cond).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "norm"), [*((f, "td_ln") for f in FAMILIES), ("UViTBao", "ada_rmsn")])
def test_units_compile_without_graph_breaks(family: str, norm: str) -> None:
    torch._dynamo.reset()
    net = make(family, norm)
    z, level, cond = inputs(family, net)
    keys, expected = list(net.state_dict()), net(z, level, cond)
    net.compile_units(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(net(z, level, cond), expected, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == keys


@every_norm
def test_saved_and_loaded(family: str, norm: str, tmp_path: Path) -> None:
    net = make(family, norm)
    assert from_plain(type(net.config), to_plain(net.config)) == net.config
    if family == "ADMClassifier":  # a companion, which is not published by itself
        with torch.device("meta"):
            other = type(net)(net.config)
        other.load_state_dict(net.state_dict(), assign=True)
    else:
        save_pretrained(net, str(tmp_path), process=GaussianProcess())
        other = load_any(tmp_path).network
    assert other.config == net.config
    z, level, cond = inputs(family, net)
    with torch.no_grad():
        assert torch.equal(other.eval()(z, level, cond), net(z, level, cond))


@pytest.mark.parametrize(
    "name", ["simple_unet_s_32", "simple_uvit_t2i_256", "simpler_uvit_64", "uvit_bao_m_64", "adm_64"]
)
def test_by_name(name: str) -> None:
    with torch.device("meta"):
        net, before = create_model(name, norm="td_ln"), create_model(name)
    # four vectors for each that the standard norm has
    ends = (".high", ".low", ".slope", ".shift")
    extra = sum(p.numel() for n, p in net.named_parameters() if n.endswith(ends))
    assert net.num_parameters() == before.num_parameters() + extra * 3 // 4
    assert extra


def test_describe_counts_them() -> None:
    more, plain = describe("simple_uvit_xs_32", norm="td_rmsn"), describe("simple_uvit_xs_32")
    assert more.parameters > plain.parameters
    assert more.multiply_adds == plain.multiply_adds


# -- bad input


@every_family
def test_norms_that_are_not_offered_are_refused(family: str) -> None:
    known = ", ".join(["standard", *offered(family)])
    with pytest.raises(UserError, match=f"expected norm to be one of {known}, got 'td_rms'; did you mean 'td_rmsn'"):
        make(family, "td_rms")
    if not family.startswith("UViT"):
        with pytest.raises(UserError, match=f"one of {known}, got 'ada_rmsn' .*class or time token"):
            make(family, "ada_rmsn")


def test_official_layouts_have_the_standard_norm_alone() -> None:
    net = make("ADMUNet", "rmsn")
    with pytest.raises(UserError, match="group norm alone, got a config with norm 'rmsn'"):
        guided_diffusion.to_official(net.state_dict(), net.config)
    net = make("UViTBao", "rmsn")
    with pytest.raises(UserError, match="layer norm alone, got a config with norm 'rmsn'"):
        official_uvit.to_official(net.state_dict(), net.config)
