"""DiMR: what the recorded tensors of tests/parity cannot show."""

import math
from dataclasses import replace

import pytest
import torch
from networks import perturbed
from official_configs import dimr_config
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffzoo.errors import UserError
from diffzoo.models import entry
from diffzoo.models.dimr import NOTES, TINY, VARIANTS, DiMR, DiMRConfig, DiMRStage
from diffzoo.nn.axial_rope import AxialRotary, QueryKeyNorm, axial_positions
from diffzoo.nn.time_dependent import NORMS, TimeDependentParameter, build_norm, gate_parameters
from diffzoo.typing import Condition
from diffzoo.zoo.converters.dimr import from_official, to_official

CONVNEXT_FIRST = DiMRConfig(
    image_size=16,
    in_channels=3,
    norm="rmsn",
    stages=(
        DiMRStage("convnext", (4, 4), width=16, hidden=24, depth=3, patch=4, kernel_size=3),
        DiMRStage("transformer", (16, 16), width=24, hidden=32, depth=1, heads=2),
    ),
)
THREE = DiMRConfig(
    image_size=16,
    in_channels=3,
    num_classes=5,
    norm="td_ln",
    stages=(
        DiMRStage("transformer", (4, 4), width=32, hidden=64, depth=3, image_ratio=2, patch=2, heads=4),
        DiMRStage("convnext", (8, 8), width=24, hidden=48, depth=3, image_ratio=2),
        DiMRStage("convnext", (16, 16), width=16, hidden=32, depth=3, kernel_size=5, head_kernel_size=1),
    ),
)
ROPE = replace(TINY, positions="axial_rope")
TEXT = replace(TINY, num_classes=0, text_width=12)
CONFIGS = {
    "two": TINY,
    "three": THREE,
    "convnext first": CONVNEXT_FIRST,
    "one": replace(TINY, stages=TINY.stages[:1]),
    "rope and class": ROPE,
    "text": TEXT,
    "text and class": replace(TINY, text_width=12),
    **{f"norm {norm}": replace(TINY, norm=norm) for norm in NORMS},
}


def lively(config: DiMRConfig) -> DiMR:
    """A network in which every parameter matters."""
    return perturbed(DiMR(config))


def inputs(config: DiMRConfig, size: tuple[int, int] | None = None, b: int = 2) -> tuple[torch.Tensor, ...]:
    z = torch.randn(b, config.in_channels, *(size or config.stages[-1].largest_input))
    label = torch.arange(b) if config.num_classes else None
    text = torch.randn(b, 5, config.text_width) if config.text_width else None
    mask = torch.tensor([[True] * 3 + [False] * 2] * b) if config.text_width else None
    return z, torch.linspace(-4, 4, b), Condition(label=label, text=text, text_mask=mask)


# -- sizes


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "dimr_xl_256": 505_046_408,
        "dimr_g_256": 1_056_352_904,
        "dimr_xl_512": 525_027_372,
        "dimr_m_64": 132_828_681,
        "dimr_l_64": 283_716_729,
    }.items(),
)
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        network = DiMR(VARIANTS[name])
    assert network.num_parameters() == count
    assert ("inferred" in entry(name).note) == (name in NOTES)


def test_every_variant_is_named_and_noted() -> None:
    assert all(entry(name).config == config for name, config in VARIANTS.items())
    assert NOTES.keys() < VARIANTS.keys()


# -- outputs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_shapes_and_gradients(config: DiMRConfig) -> None:
    network = lively(config)
    z, level, cond = inputs(config)
    outputs = network.training_outputs(z, level, cond)
    grids = [stage.grid for stage in config.stages]
    assert [tuple(out.shape) for out in outputs] == [(2, config.in_channels, *grid) for grid in grids]
    assert torch.equal(network(z, level, cond), outputs[-1])
    torch.stack([out.square().sum() for out in outputs]).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_reads_no_values(config: DiMRConfig) -> None:
    """On the meta device there are no values: whatever would wait for the accelerator fails here."""
    with torch.device("meta"):
        network = DiMR(config)
    z, level, cond = inputs(config)
    assert network(z.to("meta"), level.to("meta"), cond.to("meta")).device.type == "meta"


@pytest.mark.parametrize("config", [TINY, ROPE, CONVNEXT_FIRST], ids=["learned", "rope", "convnext first"])
@pytest.mark.parametrize("size", [(8, 8), (4, 16), (12, 8)])
def test_smaller_and_oblong_inputs(config: DiMRConfig, size: tuple[int, int]) -> None:
    z, level, cond = inputs(config, size)
    outputs = lively(config).training_outputs(z, level, cond)
    assert outputs[-1].shape == z.shape


def test_a_smaller_input_reads_the_corner_of_the_table() -> None:
    network = lively(TINY)
    z, level, cond = inputs(TINY, (8, 8))
    before = network(z, level, cond)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    inside = ((rows < 8) & (columns < 8)).flatten()
    with torch.no_grad():
        network.stages[1].positions[~inside] += 100.0
    assert torch.equal(network(z, level, cond), before)
    with torch.no_grad():
        network.stages[1].positions[inside] += 1.0
    assert not torch.allclose(network(z, level, cond), before)


def test_detached_features_stop_the_gradient() -> None:
    for detach in (True, False):
        network = lively(replace(TINY, detach_features=detach))
        network(*inputs(TINY)).square().sum().backward()
        reached = any(p.grad is not None for p in network.stages[0].blocks.parameters())
        assert reached is not detach


def test_text_that_is_masked_is_not_read() -> None:
    network = lively(TEXT).eval()
    z, level, cond = inputs(TEXT)
    before = network(z, level, cond)
    text = cond.text.clone()
    text[:, 3:] += 10.0
    assert torch.equal(network(z, level, Condition(text=text, text_mask=cond.text_mask)), before)
    text[:, :3] += 10.0
    assert not torch.allclose(network(z, level, Condition(text=text, text_mask=cond.text_mask)), before)


def test_null_text_is_no_text() -> None:
    network = lively(TEXT).eval()
    z, level, cond = inputs(TEXT)
    none = network(z, level, network.null_condition(cond))
    torch.testing.assert_close(none, network(z, level), rtol=1e-5, atol=1e-5)


def test_time_enters_through_the_norms_alone() -> None:
    still, moving = lively(replace(TINY, norm="rmsn")), lively(TINY)
    z, level, cond = inputs(TINY)
    for network, moves in ((still, True), (moving, True)):
        assert (not torch.allclose(network(z, level, cond), network(z, level + 1, cond))) is moves
    # RMSN has no time, but the norms between stages have
    heads = {name for name in gate_parameters(still) if "blocks" in name}
    assert not heads
    assert gate_parameters(still)


# -- parts


def test_time_dependent_parameter_closed_form() -> None:
    p = TimeDependentParameter(3, 1.0)
    assert torch.equal(p(torch.tensor([-1.0, 5.0])), torch.ones(2, 3))
    with torch.no_grad():
        p.high.copy_(torch.tensor([2.0, -1.0, 0.5]))
        p.low.copy_(torch.tensor([0.0, 4.0, 0.5]))
        p.shift[1] = 0.7
        p.slope[0] = 1.0
    gate = 1 / (1 + math.exp(-2 * 0.3))
    other = 1 / (1 + math.exp(-(0.3 + 0.7)))
    want = torch.tensor([[2 * gate, 4 - 5 * other, 0.5]])
    torch.testing.assert_close(p(torch.tensor([0.3])), want)
    torch.testing.assert_close(p(torch.tensor([100.0, -100.0])), torch.stack([p.high, p.low]).detach())


@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_dtype_and_compute_in_float32(name: str) -> None:
    norm = build_norm(name, 16)
    x, tau = torch.randn(2, 5, 16), torch.tensor([-0.5, 1.0])
    want = norm(x, tau).detach()
    got = norm.bfloat16()(x.bfloat16(), tau)
    assert got.dtype == torch.bfloat16
    assert float((got.detach() - want).abs().max()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.float()(x, tau).dtype == torch.bfloat16


def test_unknown_norm_names_the_nearest() -> None:
    with pytest.raises(UserError, match="td_rmsn"):
        build_norm("td_rms", 8)


def test_query_key_scale_is_bounded_and_still_learns() -> None:
    norm, limit = QueryKeyNorm(2), math.log(100)
    with torch.no_grad():
        norm.log_scale.copy_(torch.tensor([9.0, 1.0]))
    x = torch.randn(1, 2, 3, 8)
    evaluated = norm.eval()(x)
    assert norm.log_scale[0] == 9.0  # evaluation leaves weights alone
    evaluated.square().sum().backward()
    # |x|^2 = exp(log_scale) sqrt(width), so the gradient of its sum is itself, at the bound as elsewhere
    torch.testing.assert_close(norm.log_scale.grad, evaluated.square().sum((0, 2, 3)).detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        evaluated.square().sum(-1)[0, 0].detach(), torch.full((3,), 100 * 8**0.5), rtol=1e-4, atol=0
    )
    trained = norm.train()(x)
    torch.testing.assert_close(trained, evaluated)
    torch.testing.assert_close(norm.log_scale.detach(), torch.tensor([limit, 1.0]))


def test_rotation_depends_on_differences_of_position_alone() -> None:
    rotary = AxialRotary(8, 1)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(row: float, column: float) -> torch.Tensor:
        here, there = torch.tensor([[row, column]]), torch.tensor([[row + 0.25, column - 0.5]])
        return (rotary(q, here) * rotary(k, there)).sum()

    torch.testing.assert_close(score(0.0, 0.0), score(0.7, -0.3), rtol=1e-4, atol=1e-5)
    assert torch.equal(rotary(q, torch.zeros(1, 2)), q)


def test_axial_positions_keep_cells_square() -> None:
    positions = axial_positions(2, 4).unflatten(0, (2, 4))
    torch.testing.assert_close(positions[0, :, 1], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(positions[:, 0, 0], torch.tensor([-0.25, 0.25]))


# -- training and speed


def test_gates_are_exempt_from_weight_decay() -> None:
    network = DiMR(TINY)
    exempt = network.no_weight_decay()
    assert exempt == {n for n, _ in network.named_parameters() if n.endswith((".slope", ".shift"))}
    assert len(exempt) == 2 * sum(isinstance(m, TimeDependentParameter) for m in network.modules())


def test_one_graph_per_kind_of_block() -> None:
    """Six blocks, two graphs; no new one for another step of a sampler, and none for another set of weights."""
    torch._dynamo.reset()
    counter = CompileCounter()
    network = lively(TINY).eval()
    network.compile_units(backend=counter, fullgraph=True)
    z, level, cond = inputs(TINY)
    with torch.no_grad():
        for step in range(4):
            network(z, level - step, cond)
    assert counter.frame_count == 2
    assert not any("_orig_mod" in name for name in network.state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [ROPE, TEXT], ids=["rope", "text"])
def test_low_precision(config: DiMRConfig) -> None:
    network = lively(config).eval()
    z, level, cond = inputs(config)
    with torch.no_grad():
        want = network(z, level, cond)
        with torch.autocast("cpu", torch.bfloat16):
            cast = network(z, level, cond)
        stored = network.bfloat16()(z, level, cond)
    for got in (cast, stored):
        assert got.dtype == torch.bfloat16
        assert float((got - want).square().mean().sqrt() / want.std()) < 0.05


def test_dropout_sits_on_the_residual_branches_of_the_blocks() -> None:
    network = DiMR(TINY.override(dropout=0.3, dropout_from_resolution=8))
    found = [[m.p for m in stage.modules() if isinstance(m, nn.Dropout)] for stage in network.stages]
    assert found == [[0.3] * 3, [0.0] * 3]
    z, level, cond = inputs(TINY)
    assert not torch.equal(network.train()(z, level, cond), network(z, level, cond))


# -- config


def test_overrides_by_resolution() -> None:
    config = TINY.override(depth_at={8: 5}, width_at={"16": 24}, num_classes=3)
    assert [s.depth for s in config.stages] == [5, 3]
    assert [(s.width, s.hidden) for s in config.stages] == [(32, 64), (24, 48)]
    assert config.num_classes == 3


STAGE = {"kind": "transformer", "grid": [8, 8], "width": 32, "hidden": 64, "depth": 3, "patch": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth_at": {4: 3}}, "no level of 4 px"),
        ({"depth_at": {8: 4}}, "odd"),
        ({"norm": "tdrmsn"}, "td_rmsn"),
        ({"positions": "rope"}, "axial_rope"),
        ({"image_size": 31}, "does not divide by 2"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": TINY.stages[::-1]}, "coarse to fine"),
        ({"stages": [{**STAGE, "heads": 5}]}, "heads"),
        ({"dropout_from_resolution": 8}, "dropout"),
        ({"depht": 3}, "no argument"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TINY.override(**changes)


def test_wrong_inputs_are_refused() -> None:
    network = DiMR(TINY)
    z, level, cond = inputs(TINY)
    for bad in (z[:, :3], z[..., :7], torch.randn(2, 4, 16, 15), z[0]):
        with pytest.raises(UserError, match="expected an input of shape"):
            network(bad, level, cond)
    with pytest.raises(UserError, match="no text"):
        network(z, level, replace(cond, text=torch.randn(2, 5, 8)))
    with pytest.raises(UserError, match="class labels"):
        network(z, level)


# -- converter


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_conversion_there_and_back(config: DiMRConfig) -> None:
    state = DiMR(config).state_dict()
    official = to_official(state, config)
    assert len(official) == len(state)
    back = from_official(official, config)
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_wrong_weights_are_refused_by_name() -> None:
    state = to_official(DiMR(TINY).state_dict(), TINY)
    name = "stages.0.class_embeds.weight"
    with pytest.raises(UserError, match=f"missing {name}"):
        from_official({k: v for k, v in state.items() if k != name}, TINY)
    with pytest.raises(UserError, match=r"unknown stages\.9\.x"):
        from_official({**state, "stages.9.x": torch.zeros(1)}, TINY)
    with pytest.raises(UserError, match=rf"{name} has shape \(1001, 32\), this config needs \(11, 32\)"):
        from_official({**state, name: torch.zeros(1001, 32)}, TINY)


def test_official_config_with_a_typo_is_refused() -> None:
    with pytest.raises(UserError, match="norm_type"):
        dimr_config({"channels": 4, "norm_typ": "LN", "stage_configs": []})
