"""U-ViT of Bao et al.: what the recorded tensors of tests/parity cannot show."""

import math
from dataclasses import replace

import pytest
import torch
from networks import perturbed
from official_configs import uvit_config
from torch._dynamo.testing import CompileCounter

from diffzoo.errors import UserError
from diffzoo.models import entry
from diffzoo.models.uvit_bao import TINY, VARIANTS, UViTBao, UViTBaoConfig
from diffzoo.nn.embeddings import cosine_sine
from diffzoo.nn.patches import from_patches
from diffzoo.typing import Condition
from diffzoo.zoo.converters.uvit_bao import from_official, to_official

TEXT = replace(TINY, num_classes=0, null_class=False, text_width=12, text_tokens=7)
CONFIGS = {
    "classes": TINY,
    "unconditional": replace(TINY, num_classes=0),
    "text": TEXT,
    "time mlp": replace(TINY, mlp_time_embed=True, qkv_bias=True),
    "no skip, no conv": replace(TINY, skip=False, conv=False),
    "odd width": replace(TINY, width=33, heads=3, patch=4),
}


def lively(config: UViTBaoConfig) -> UViTBao:
    return perturbed(UViTBao(config))


def inputs(config: UViTBaoConfig, b: int = 2) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    z = torch.randn(b, config.in_channels, config.image_size, config.image_size)
    label = torch.arange(b) if config.num_classes else None
    text = torch.randn(b, config.text_tokens, config.text_width) if config.text_width else None
    return z, torch.linspace(1, 1000, b), Condition(label=label, text=text)


@pytest.mark.parametrize(
    ("name", "count", "rows"),
    [
        ("uvit_bao_s_32", 44_255_328, 0),
        ("uvit_bao_s_64", 44_292_228, 0),
        ("uvit_bao_m_64", 130_940_292, 1000),
        ("uvit_bao_l_64", 286_827_652, 1000),
        ("uvit_bao_l_256", 286_763_172, 1001),
        ("uvit_bao_h_256", 500_832_016, 1001),
        ("uvit_bao_l_512", 286_861_524, 1001),
        ("uvit_bao_h_512", 500_942_656, 1001),
        ("uvit_bao_t2i_s_256", 44_692_644, 0),
        ("uvit_bao_t2i_s_deep_256", 58_345_636, 0),
    ],
)
def test_published_sizes(name: str, count: int, rows: int) -> None:
    config = VARIANTS[name]
    assert entry(name).config == config
    with torch.device("meta"):
        network = UViTBao(config)
    assert network.num_parameters() == count
    assert config.class_rows == rows


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients(config: UViTBaoConfig) -> None:
    network = lively(config)
    z, level, cond = inputs(config)
    out = network(z, level, cond)
    assert out.shape == z.shape
    out.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_reads_no_values(config: UViTBaoConfig) -> None:
    with torch.device("meta"):
        network = UViTBao(config)
    z, level, cond = inputs(config)
    assert network(z.to("meta"), level.to("meta"), cond.to("meta")).shape == z.shape


def test_sinusoid_closed_form() -> None:
    got = cosine_sine(torch.tensor([0.0, 2.5]), 5)
    slow = 2.5 * math.exp(-math.log(10000) / 2)
    want = [[1, 1, 0, 0, 0], [math.cos(2.5), math.cos(slow), math.sin(2.5), math.sin(slow), 0]]
    torch.testing.assert_close(got, torch.tensor(want))


def test_image_is_assembled_patch_by_patch() -> None:
    patches = torch.arange(64 * 16.0).reshape(1, 64, 16)  # 8 x 8 patches of 2 x 2 pixels and 4 channels
    image = from_patches(patches, 8, 2)
    assert image.shape == (1, 4, 16, 16)
    row, column, channel = 5, 14, 3
    patch, inside = (row // 2) * 8 + column // 2, ((row % 2) * 2 + column % 2) * 4 + channel
    assert image[0, channel, row, column] == patches[0, patch, inside]


def test_skips_join_first_and_last() -> None:
    """With skip layers that read their second half alone, the last block sees the first block's output."""
    network = lively(TINY).eval()
    seen = {}
    for name, i in (("first", 0), ("last", len(network.blocks) - 1)):
        network.blocks[i].register_forward_hook(lambda m, args, out, n=name: seen.update({n: (args[0], out)}))
    with torch.no_grad():
        skip = network.skips[-1]
        skip.weight.copy_(torch.cat([torch.zeros(32, 32), torch.eye(32)], dim=1))
        skip.bias.zero_()
        network(*inputs(TINY))
    torch.testing.assert_close(seen["last"][0], seen["first"][1])


def test_null_text_is_what_the_caller_says() -> None:
    network = lively(TEXT).eval()
    z, level, cond = inputs(TEXT)
    with pytest.raises(UserError, match="set_null_text"):
        network.null_condition(cond)
    empty = torch.randn(1, 7, 12)
    network.set_null_text(empty)
    null = network.null_condition(cond)
    assert torch.equal(null.text, empty.expand(2, -1, -1))
    assert torch.equal(network(z, level, null), network(z, level, Condition(text=empty.repeat(2, 1, 1))))
    assert "null_text" not in network.state_dict()
    assert network.double().null_text.dtype == torch.float64  # it moves with the network
    with pytest.raises(UserError, match=r"\(7, 12\)"):
        network.set_null_text(torch.randn(7, 11))


def test_null_class() -> None:
    network = UViTBao(TINY)
    _, _, cond = inputs(TINY)
    assert network.null_condition(cond).label.tolist() == [10, 10]
    with pytest.raises(UserError, match="null class"):
        UViTBao(replace(TINY, null_class=False)).null_condition(cond)


def test_one_graph_for_all_blocks() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    network = lively(TINY).eval()
    network.compile_units(backend=counter, fullgraph=True)
    z, level, cond = inputs(TINY)
    with torch.no_grad():
        for step in range(4):
            network(z, level - step, cond)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_low_precision_with_text() -> None:
    network = lively(TEXT).eval()
    z, level, cond = inputs(TEXT)
    with torch.no_grad():
        want = network(z, level, cond)
        with torch.autocast("cpu", torch.bfloat16):
            cast = network(z, level, cond)
        stored = network.bfloat16()(z, level, cond)
    for got in (cast, stored):
        assert got.dtype == torch.bfloat16
        assert float((got - want).square().mean().sqrt() / want.std()) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "divide an image"),
        ({"heads": 5}, "heads"),
        ({"depth": 4}, "odd"),
        ({"text_width": 12}, "not both"),
        ({"depth_at": {8: 3}}, "no resolution levels"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TINY.override(**changes)


def test_wrong_inputs_are_refused() -> None:
    network, text = UViTBao(TINY), UViTBao(TEXT)
    z, level, cond = inputs(TINY)
    with pytest.raises(UserError, match="expected an input of shape"):
        network(z[..., :7], level, cond)
    with pytest.raises(UserError, match="does not read text"):
        network(z, level, replace(cond, text=torch.randn(2, 7, 12)))
    with pytest.raises(UserError, match=r"\(2, 7, 12\), got none"):
        text(z, level)
    with pytest.raises(UserError, match=r"got \(2, 6, 12\)"):
        text(z, level, Condition(text=torch.randn(2, 6, 12)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_conversion_there_and_back(config: UViTBaoConfig) -> None:
    state = UViTBao(config).state_dict()
    back = from_official(to_official(state, config), config)
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_official_config() -> None:
    config = uvit_config({"name": "uvit", "depth": 12, "num_classes": 11, "use_checkpoint": True})
    assert (config.depth, config.num_classes, config.null_class) == (13, 10, True)
    assert uvit_config({"num_classes": 11}, null_class=False).num_classes == 11
    with pytest.raises(UserError, match="embed_dim"):
        uvit_config({"embed_dims": 3})
