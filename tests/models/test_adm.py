"""ADM's networks: options, overrides, bad input; its converter on every member of the family."""

import math

import pytest
import torch
import torch.nn.functional as F
from official_configs import adm_config
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models.adm import (
    CLASSIFIERS,
    TINY,
    TINY_CLASSIFIER,
    VARIANTS,
    ADMClassifier,
    ADMConfig,
    ADMUNet,
    Attention,
    GroupNorm,
    TimeEmbedding,
    adm_levels,
)
from diffzoo.models.registry import build, list_models
from diffzoo.record import from_plain, to_plain
from diffzoo.typing import Condition
from diffzoo.zoo.converters.guided_diffusion import from_official, to_official

MEMBERS = {**VARIANTS, **CLASSIFIERS}
# one name for each set of shapes: the four LSUN models have those of adm_256_uncond


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that zero-initialised layers hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5)
    return network.eval()


def inputs(config: ADMConfig, batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    z = torch.randn(batch, config.in_channels, config.image_size, config.image_size)
    label = torch.arange(batch) % config.num_classes if config.num_classes else None
    low = torch.randn(batch, config.in_channels, 4, 4) if config.upsampler else None
    return z, torch.tensor([3.0, 700.0])[:batch], Condition(label=label, low_res=low)


# -- blocks


@pytest.mark.parametrize("width", [8, 9])
def test_time_embedding_is_cosines_then_sines(width: int) -> None:
    embedding = TimeEmbedding(width)
    n = torch.tensor([0.0, 7.0, 999.5])
    half = width // 2
    angles = [[float(v) / 10000 ** (i / half) for i in range(half)] for v in n]
    waves = torch.tensor([[math.cos(a) for a in r] + [math.sin(a) for a in r] + [0.0] * (width % 2) for r in angles])
    want = embedding.linear2(F.silu(embedding.linear1(waves)))
    torch.testing.assert_close(embedding(n), want)


def reference_attention(block: Attention, x: Tensor, row: object) -> Tensor:
    """Attention, number by number; `row(head, part, channel)` says where in the 3c channels a value lies."""
    b, c, height, width = x.shape
    d = c // block.heads
    qkv = block.qkv(block.norm(x).flatten(2).transpose(1, 2))
    out = torch.zeros(b, height * width, c)
    for head in range(block.heads):
        q, k, v = (qkv[..., [row(head, part, i) for i in range(d)]] for part in range(3))  # type: ignore[operator]
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d), dim=-1)
        out[..., head * d : (head + 1) * d] = weights @ v
    return x + block.out(out).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_orders_lay_out_the_channels_as_they_say(order: str) -> None:
    block = randomised(Attention(32, heads=4, order=order))  # type: ignore[arg-type]
    x = torch.randn(2, 32, 3, 4)
    rows = {"legacy": lambda h, part, i: h * 24 + part * 8 + i, "new": lambda h, part, i: part * 32 + h * 8 + i}
    got = block(x)
    torch.testing.assert_close(got, reference_attention(block, x, rows[order]), rtol=1e-4, atol=1e-5)
    other = rows["new" if order == "legacy" else "legacy"]
    assert (got - reference_attention(block, x, other)).abs().max() > 0.1


def test_the_orders_agree_with_one_head_only() -> None:
    for heads, same in ((1, True), (2, False)):
        pair = [randomised(Attention(32, heads, order)) for order in ("legacy", "new")]  # type: ignore[arg-type]
        x = torch.randn(1, 32, 4, 4)
        assert torch.allclose(pair[0](x), pair[1](x), atol=1e-6) is same


def test_the_order_of_every_released_model() -> None:
    assert {name for name, config in MEMBERS.items() if config.attention_order == "new"} == {
        "adm_64",
        "edm_64",
        "edm_256_uncond",
    }


def test_group_norm_is_float32_inside() -> None:
    norm, x = GroupNorm(64).bfloat16(), (torch.randn(2, 64, 8, 8) * 3 + 100).bfloat16()
    want = F.group_norm(x.float(), 32, eps=1e-5).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), want)


def test_classifier_against_its_formulas() -> None:
    network = randomised(ADMClassifier(TINY_CLASSIFIER))
    z, level, _ = inputs(TINY)
    h, _ = network._encode(z, network.time(level), level)
    h = F.silu(network.norm_out(h)).flatten(2)  # (b, c, n)
    state = to_official(network.state_dict(), TINY_CLASSIFIER)
    tokens = torch.cat([h.mean(2, keepdim=True), h], dim=2) + state["out.2.positional_embedding"]
    qkv = F.conv1d(tokens, state["out.2.qkv_proj.weight"], state["out.2.qkv_proj.bias"])
    q, k, v = (part.reshape(2, 4, 16, -1) for part in qkv.chunk(3, dim=1))  # the new order, four heads of 16 channels
    weights = torch.softmax(torch.einsum("bhdn,bhdm->bhnm", q, k) / 4, dim=-1)
    pooled = torch.einsum("bhnm,bhdm->bhdn", weights, v).reshape(2, 64, -1)
    logits = F.conv1d(pooled, state["out.2.c_proj.weight"], state["out.2.c_proj.bias"])[..., 0]
    assert network(z, level).shape == (2, TINY_CLASSIFIER.num_classes)
    torch.testing.assert_close(network(z, level), logits, rtol=1e-4, atol=1e-5)


def test_the_upsampler_sees_the_enlarged_image_after_the_noisy_one() -> None:
    network = randomised(ADMUNet(TINY.override(upsampler=True)))
    z, level, cond = inputs(network.config)
    seen: list[Tensor] = []
    network.conv_in.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    network(z, level, cond)
    assert torch.equal(seen[0][:, :3], z)
    # bilinear between pixel centres: of 16, pixel i lies at (i + 0.5) / 4 - 0.5, so 1 beyond the border, 2 at 0.125
    low = cond.low_res
    assert low is not None
    torch.testing.assert_close(seen[0][:, 3:, 0, 1], low[:, :, 0, 0])
    torch.testing.assert_close(seen[0][:, 3:, 0, 2], 0.875 * low[:, :, 0, 0] + 0.125 * low[:, :, 0, 1])


# -- options, registry arguments

OPTIONS = [
    {},
    {"scale_shift_norm": False},
    {"residual_resampling": False},
    {"residual_resampling": False, "conv_resampling": False},
    {"attention_order": "new"},
    {"head_channels": None},
    {"head_channels": None, "heads_up": 2},
    {"learned_variance": False},
    {"upsampler": True},
    {"num_classes": 0},
    {"num_classes": 3, "null_class": True},
    {"depth_at": {8: 3}, "width_at": {16: 64}},
    {"image_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict) -> None:
    network = randomised(ADMUNet(TINY.override(**options)))
    z, level, cond = inputs(network.config)
    out = network(z, level, cond)
    assert out.shape == (2, 3 if options.get("learned_variance") is False else 6, *z.shape[2:])
    assert out.isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    state = network.state_dict()
    official = to_official(state, network.config)
    back = from_official(official, network.config)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert from_plain(ADMConfig, to_plain(network.config)) == network.config


def test_initial_output_is_zero() -> None:
    network = ADMUNet(TINY)
    assert not network(*inputs(TINY)).any()


def test_image_size_moves_the_levels() -> None:
    levels = TINY.override(image_size=64, depth_at={32: 2}).levels
    assert [(v.resolution, v.depth, v.attention) for v in levels] == [(64, 1, False), (32, 2, True)]


def dropouts(network: ADMUNet, z: Tensor, level: Tensor, cond: Condition) -> set[tuple[int, float]]:
    """(feature-map resolution, probability) of every dropout that runs."""
    found: set[tuple[int, float]] = set()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, args, output: found.add((args[0].shape[-1], m.p)))
    network(z, level, cond)
    return found


def test_dropout_sits_where_the_config_says() -> None:
    config = ADMConfig(image_size=32, base_width=32, head_channels=32, levels=adm_levels(32, 32, 1, (1, 1, 1), (8,)))
    for start, want in (
        (32, {32: 0.2, 16: 0.2, 8: 0.2}),
        (16, {32: 0.0, 16: 0.2, 8: 0.2}),
        (8, {32: 0.0, 16: 0.0, 8: 0.2}),
    ):
        network = ADMUNet(config.override(dropout=0.2, dropout_from_resolution=start))
        assert dropouts(network, *inputs(network.config)) == set(want.items())


def test_checkpointing_changes_nothing() -> None:
    network = randomised(ADMUNet(TINY)).train()
    batch, grads = inputs(TINY), []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        network(*batch).square().sum().backward()
        grads.append([p.grad.clone() for p in network.parameters()])  # type: ignore[union-attr]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_classifiers_are_listed_apart() -> None:
    assert not [name for name in list_models() if "classifier" in name]
    assert list_models("adm_*", kind="classifier") == sorted(CLASSIFIERS)
    with torch.device("meta"):
        assert isinstance(build("adm_classifier_64"), ADMClassifier)


# -- bad input


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({"num_classes": 0}, {"label": [1, 2]}, "unconditional"),
        ({}, {}, "give it class labels"),
        ({}, {"label": [1]}, "one class label per image"),
        ({}, {"label": [1, 2], "low_res": (2, 3, 4, 4)}, "no upsampler"),
        ({"upsampler": True}, {"label": [1, 2]}, "is an upsampler"),
        ({"upsampler": True}, {"label": [1, 2], "low_res": (2, 1, 4, 4)}, r"\(2, 3, h, w\), got \(2, 1, 4, 4\)"),
    ],
)
def test_conditions_that_do_not_fit(options: dict, cond: dict, message: str) -> None:
    network = ADMUNet(TINY.override(**options))
    label = torch.tensor(cond["label"]) if "label" in cond else None
    low = torch.zeros(cond["low_res"]) if "low_res" in cond else None
    with pytest.raises(UserError, match=message):
        network(torch.zeros(2, 3, 16, 16), torch.zeros(2), Condition(label=label, low_res=low))


def test_a_released_model_has_no_null_class() -> None:
    with pytest.raises(UserError, match="no null class"):
        ADMUNet(TINY).null_condition(Condition(label=torch.tensor([1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_order": "old"}, "attention_order"),
        ({"width_at": {8: 40}}, "multiples of 32"),
        ({"head_channels": 48}, "do not divide into heads of 48"),
        ({"depth_at": {8: 0}}, "got 0"),
        ({"levels": adm_levels(16, 32, 0, (1,))}, "at least 1"),
        ({"depth_at": {4: 2}}, "no level of 4 px"),
        ({"image_size": 17}, "does not divide down"),
        ({"heds": 2}, "heads_up"),
    ],
)
def test_bad_configs(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TINY.override(**change)


# -- converter


def official_state(name: str) -> dict[str, Tensor]:
    """The tensors of a released file, without memory."""
    with torch.device("meta"):
        network = build(name)
    return to_official(network.state_dict(), network.config)  # type: ignore[arg-type]


def test_another_number_of_classes_and_strangers() -> None:
    state = official_state("adm_64")
    with pytest.raises(UserError, match=r"label_emb.weight has shape \(1000, 768\), this config needs \(10, 768\)"):
        from_official(state, MEMBERS["adm_64"].override(num_classes=10))
    state["out.2.weight"] = state["out.2.weight"][:3]
    with pytest.raises(UserError, match=r"out.2.weight has shape \(3, 192, 3, 3\), this config needs \(6, 192, 3, 3\)"):
        from_official(state, MEMBERS["adm_64"])
    del state["out.2.weight"]
    with pytest.raises(UserError, match=r"missing out\.2\.weight"):
        from_official(state, MEMBERS["adm_64"])
    with pytest.raises(UserError, match=r"ADM weights: missing conv_out\.weight"):
        to_official({k: v for k, v in ADMUNet(TINY).state_dict().items() if k != "conv_out.weight"}, TINY)


def test_conversion_copies_no_large_tensor() -> None:
    network = randomised(ADMUNet(TINY))
    official = to_official(network.state_dict(), TINY)
    ours = from_official(official, TINY)
    assert all(ours[k].data_ptr() == v.data_ptr() for k, v in network.state_dict().items())


def test_script_flags_that_were_not_released() -> None:
    flags = {"image_size": 64, "num_channels": 64, "channel_mult": "1,2", "attention_resolutions": "32", "num_heads": 2}
    config = adm_config({**flags, "class_cond": True})
    assert [(v.width, v.depth, v.attention) for v in config.levels] == [(64, 2, False), (128, 2, True)]
    assert (config.num_classes, config.learned_variance, config.head_channels) == (1000, False, None)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="give channel_mult"):
        adm_config({"image_size": 96})
    with pytest.raises(UserError, match="3 or 6 output channels"):
        adm_config({"image_size": 8, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1})
    with pytest.raises(UserError, match="attention pooling"):
        adm_config({"image_size": 64, "classifier_width": 128, "classifier_pool": "spatial"})
