"""Every registered network: it builds at full size on the meta device, and its family's tiny relative works."""

import time
from dataclasses import replace

import pytest
import torch
from networks import FAMILIES, perturbed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from diffzoo.errors import UserError
from diffzoo.models import Config, Level, LevelConfig, Network, build, dit, entry, list_models
from diffzoo.models.base import Recompute
from diffzoo.models.dit import DiT
from diffzoo.models.simple_unet import SimpleUNet, SimpleUNetConfig
from diffzoo.models.simple_uvit import SimpleUViT
from diffzoo.models.simpler_uvit import SimplerUViT
from diffzoo.models.summary import describe, example_inputs
from diffzoo.record import from_plain, to_plain
from diffzoo.typing import Condition

NAMES = list_models()
CLASSIFIERS = list_models(kind="classifier")


def tiny_networks() -> dict[str, tuple[type[Network], Config]]:
    """One small config per registered family, which its module gives as TINY, and some more of ours."""
    found = dict(FAMILIES)
    uvit = found["SimpleUViT"][1]
    fine, coarse = uvit.levels
    found["SimpleUViT-text"] = (
        SimpleUViT,
        replace(uvit, num_classes=0, text_width=12, levels=(replace(fine, attention=True, heads=2), coarse)),
    )
    found["SimpleUViT-text-and-classes"] = (SimpleUViT, replace(uvit, text_width=12))
    found["SimpleUNet-dwt"] = (SimpleUNet, found["SimpleUNet"][1].override(input_transform="dwt-1"))
    found["SimplerUViT-patch"] = (SimplerUViT, found["SimplerUViT"][1].override(input_transform="patch-2"))
    found["DiT-jit"] = (DiT, dit.TINY_JIT)
    found["DiT-variance"] = (DiT, dit.TINY.override(learned_variance=True))
    found["DiT-head"] = (DiT, dit.TINY_HEAD)
    found["SimpleUNet-unconditional"] = (SimpleUNet, replace(found["SimpleUNet"][1], num_classes=0))
    for family, norm in (
        ("SimpleUNet", "td_ln"),
        ("SimpleUViT", "td_rmsn"),
        ("UViTBao", "ada_rmsn"),
        ("ADMUNet", "td_ln"),
    ):
        found[f"{family}-{norm}"] = (found[family][0], found[family][1].override(norm=norm))
    return found


TINY = tiny_networks()
LEVELLED = [k for k, (_, c) in TINY.items() if isinstance(c, LevelConfig)]
SIMPLE = [k for k in TINY if k.startswith("Simple")]
quiet_compiler = pytest.mark.filterwarnings("ignore")  # tracing touches what warns
every_family = pytest.mark.parametrize("family", TINY)


def make(family: str, perturb: bool = True, **overrides: object) -> Network:
    """A tiny network; perturbed, so that what starts at zero hides nothing."""
    torch.manual_seed(0)
    network, config = TINY[family]
    net = network(config.override(**overrides) if overrides else config)
    return perturbed(net, 0.05) if perturb else net


def inputs(net: Network, batch: int = 2) -> tuple[Tensor, Tensor, Condition | None]:
    torch.manual_seed(1)
    return example_inputs(net.config, batch, "cpu")


def outputs_and_gradients(net: Network) -> tuple[list[Tensor], list[Tensor]]:
    outputs = net.training_outputs(*inputs(net))
    loss = sum(((y.float() - 0.3) ** 2).mean() for y in outputs)
    return [y.detach() for y in outputs], list(torch.autograd.grad(loss, list(net.parameters())))


# -- full sizes, on the meta device


@pytest.mark.parametrize("name", NAMES + CLASSIFIERS)
def test_builds_on_meta_at_once(name: str) -> None:
    with torch.device("meta"):
        build(name)  # the first build in a process pays for imports inside torch
        start = time.process_time()
        net = build(name)
        seconds = time.process_time() - start
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert seconds < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_json(name: str) -> None:
    config = entry(name).config
    assert from_plain(type(config), to_plain(config)) == config


# facts/figures of arXiv:2301.11093, 2403.06807 (A.1) and of the tables that quote 2410.19324; tolerance as derived
PARAMETERS = {
    "simple_unet_128": (0.98e9, 0.03),
    "simple_unet_256": (0.97e9, 0.03),
    "simple_unet_512": (1.0e9, 0.03),
    "simple_uvit_128": (2.45e9, 0.01),
    "simple_uvit_256": (2.45e9, 0.01),
    "simple_uvit_512": (2.45e9, 0.01),
    "simpler_uvit_64": (394.2e6, 0.01),
    "simpler_uvit_128": (397.6e6, 0.01),
    "simpler_uvit_p2_256": (397.6e6, 0.01),
    "simpler_uvit_p1_256": (397.6e6, 0.01),
    "simpler_uvit_p4_512": (397.6e6, 0.01),
    "simpler_uvit_p2_512": (397.6e6, 0.01),
}
MULTIPLY_ADDS = {
    "simpler_uvit_64": (108.4e9, 0.01),
    "simpler_uvit_128": (137.4e9, 0.01),
    "simpler_uvit_p2_256": (137.4e9, 0.01),
    "simpler_uvit_p4_512": (137.4e9, 0.01),
    "simpler_uvit_p1_256": (652.8e9, 0.01),
    "simpler_uvit_p2_512": (652.8e9, 0.01),
    "simple_uvit_256": (555e9, 0.02),  # quoted without saying what is counted
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name: str) -> None:
    expected, tolerance = PARAMETERS[name]
    with torch.device("meta"):
        assert build(name).num_parameters() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("simpler_uvit_64", "simpler_uvit_p1_256") else pytest.mark.slow)
        for name in MULTIPLY_ADDS
    ],
)
def test_published_multiply_adds(name: str) -> None:
    expected, tolerance = MULTIPLY_ADDS[name]
    assert describe(name).multiply_adds == pytest.approx(expected, rel=tolerance)


# -- tiny relatives


@every_family
def test_output_has_the_right_shape_and_is_finite(family: str) -> None:
    net = make(family)
    z, level, cond = inputs(net, 3)
    y = net(z, level, cond)
    channels = z.shape[1] * (2 if net.config.learned_variance else 1)
    assert y.shape == (3, channels, *z.shape[2:])
    assert y.isfinite().all()
    torch.testing.assert_close(net.eval().training_outputs(z, level, cond)[-1], net(z, level, cond))


@every_family
def test_every_parameter_gets_a_gradient(family: str) -> None:
    net = make(family)
    for name, p, g in zip(*zip(*net.named_parameters(), strict=True), outputs_and_gradients(net)[1], strict=True):
        assert g.shape == p.shape
        assert g.isfinite().all()
        assert g.abs().max() > 0, name


@every_family
def test_eval_is_deterministic_and_images_are_independent(family: str) -> None:
    net = make(family).eval()
    z, level, cond = inputs(net, 3)
    with torch.no_grad():
        y = net(z, level, cond)
        torch.testing.assert_close(net(z, level, cond), y, rtol=0, atol=0)
        one = net(z[1:2], level[1:2], None if cond is None else cond[1:2])
    torch.testing.assert_close(one, y[1:2], rtol=1e-4, atol=1e-5)


@every_family
def test_output_depends_on_everything_it_is_given(family: str) -> None:
    net = make(family).eval()
    z, level, cond = inputs(net)
    with torch.no_grad():
        y = net(z, level, cond)
        assert (net(z, level + 1.5, cond) - y).abs().max() > 1e-6
        assert (net(z + 0.1, level, cond) - y).abs().max() > 1e-6
        for field in ("label", "text", "low_res"):
            given = getattr(cond, field, None)
            if given is not None:
                changed = replace(cond, **{field: given.flip(0)})
                assert (net(z, level, changed) - y).abs().max() > 1e-6, field


@every_family
def test_bfloat16_agrees(family: str) -> None:
    net = make(family).eval()
    z, level, cond = inputs(net)
    with torch.no_grad():
        y = net(z, level, cond)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(z, level, cond)
        half = cond if cond is None or cond.text is None else replace(cond, text=cond.text.bfloat16())
        pure = net.to(torch.bfloat16)(z.bfloat16(), level, half)
    assert pure.dtype == torch.bfloat16
    for other in (mixed, pure):
        assert (other.float() - y).norm() < 0.06 * y.norm()


@every_family
@pytest.mark.parametrize("what", [True, "all_but_attention"])
def test_activation_checkpointing_agrees(family: str, what: Recompute) -> None:
    plain, saving = make(family), make(family)
    saving.set_grad_checkpointing(what)
    runs = []
    for net in (plain, saving):
        torch.manual_seed(2)  # the same dropout
        runs.append(outputs_and_gradients(net))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@every_family
def test_checkpointing_recomputes_every_unit(family: str) -> None:
    net = make(family)
    net.set_grad_checkpointing()
    calls: dict[int, int] = {}
    for unit in net.units():
        unit.register_forward_pre_hook(lambda m, _: calls.__setitem__(id(m), calls.get(id(m), 0) + 1))
    outputs_and_gradients(net)
    assert set(calls.values()) == {2}
    assert len(calls) == len(list(net.units())) > 0


class _Attentions(TorchDispatchMode):
    """Counts attention in a forward pass, not its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("what", "times"), [(False, 1), ("all_but_attention", 1), (True, 2)])
def test_attention_is_kept_and_not_computed_again(what: Recompute, times: int) -> None:
    net = make("SimpleUViT")
    blocks = sum(type(m).__name__ == "TransformerBlock" for m in net.units())
    net.set_grad_checkpointing(what)
    with _Attentions() as attentions:
        outputs_and_gradients(net)
    assert attentions.count == times * blocks > 0


def _compiled_agrees(family: str, **options: object) -> None:
    torch._dynamo.reset()
    net = make(family).eval()
    keys, expected = list(net.state_dict()), outputs_and_gradients(net)
    net.compile_units(**options)
    torch.testing.assert_close(outputs_and_gradients(net), expected, rtol=1e-3, atol=1e-4)
    assert list(net.state_dict()) == keys


@pytest.mark.slow
@quiet_compiler
@every_family
def test_compiled_units_agree(family: str) -> None:
    _compiled_agrees(family)


@pytest.mark.slow
@quiet_compiler
@every_family
def test_units_compile_without_graph_breaks(family: str) -> None:
    _compiled_agrees(family, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@quiet_compiler
def test_many_widths_do_not_exhaust_the_compiler() -> None:
    """Six levels are more graphs of one `forward` than torch allows by default; the rest would silently run eager."""
    torch._dynamo.reset()
    levels = tuple(Level(32 >> i, 8 * (i + 1), 1) for i in range(6))
    net = SimpleUNet(SimpleUNetConfig(image_size=32, emb_channels=8, levels=levels))
    net.compile_units(backend=CompileCounter(), fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            net(*inputs(net)).sum().backward()


@pytest.mark.slow
@quiet_compiler
@every_family
def test_whole_network_compiles(family: str) -> None:
    torch._dynamo.reset()
    net = make(family).eval()
    with torch.no_grad():
        compiled = torch.compile(net)(*inputs(net))
        torch.testing.assert_close(compiled, net(*inputs(net)), rtol=1e-3, atol=1e-4)


@every_family
def test_meta_build_with_assigned_weights_is_the_same_network(family: str) -> None:
    net = make(family).eval()
    with torch.device("meta"):
        empty = type(net)(net.config)
    empty.load_state_dict(net.state_dict(), strict=True, assign=True)
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    with torch.no_grad():
        torch.testing.assert_close(empty.eval()(*inputs(net)), net(*inputs(net)), rtol=0, atol=0)


@every_family
def test_units_hold_most_parameters_and_name_linear_layers(family: str) -> None:
    net = make(family)
    assert set(net.units()) <= set(net.fsdp_units())
    modules = dict(net.named_modules())
    targets = net.lora_targets()
    assert bool(targets) == (family != "EDM2UNet")  # whose weights are normalised where they are used
    assert all(isinstance(modules[name], nn.Linear) for name in targets)
    assert net.no_weight_decay() <= {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("family", [*SIMPLE, "ADMUNet", "DiT", "DiT-jit", "DiT-head", "EDM2UNet"])
def test_output_starts_at_zero(family: str) -> None:
    net = make(family, perturb=False)
    assert net(*inputs(net)).abs().max() == 0


# -- bad input


@pytest.mark.parametrize("wrong", [{"in_channels": 0}, {"num_classes": -1}])
@every_family
def test_numbers_of_channels_and_classes(family: str, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected one channel or more"):
        make(family).config.override(**wrong)


@every_family
def test_wrong_input_shape_says_expected_and_given(family: str) -> None:
    net = make(family)
    z, level, cond = inputs(net)
    c = net.config.in_channels
    narrow = z[..., : -1 if net.config.cell > 1 else 0]
    for wrong in (z[:, :-1], narrow, z[0]):
        with pytest.raises(UserError, match=rf"expected an input of shape \(b, {c}, .*got \({wrong.shape[0]}, "):
            net(wrong, level, cond)


@every_family
def test_missing_and_superfluous_labels(family: str) -> None:
    net = make(family)
    z, level, cond = inputs(net)
    if net.config.num_classes:
        with pytest.raises(UserError, match=f"has {net.config.num_classes} classes: give it class labels"):
            net(z, level, Condition(text=cond.text))
        with pytest.raises(UserError, match="3 labels for 2 images"):
            net(z, level, replace(cond, label=torch.zeros(3, dtype=torch.int64)))
    else:
        with pytest.raises(UserError, match="unconditional"):
            net(z, level, Condition(label=torch.zeros(2, dtype=torch.int64)))


@pytest.mark.parametrize("family", SIMPLE)
def test_missing_superfluous_and_misshapen_text(family: str) -> None:
    net = make(family)
    z, level, cond = inputs(net)
    label = cond.label if cond is not None else None
    if not net.config.text_width:
        with pytest.raises(UserError, match="takes no text"):
            net(z, level, Condition(label=label, text=torch.randn(2, 3, 12)))
        return
    with pytest.raises(UserError, match=r"draws from captions: give it text embeddings of shape \(b, n, 12\)"):
        net(z, level, Condition(label=label))
    with pytest.raises(UserError, match=r"expected text embeddings \(2, n, 12\), got \(2, 3, 11\)"):
        net(z, level, Condition(label=label, text=torch.randn(2, 3, 11)))


@every_family
def test_unknown_argument_names_the_nearest(family: str) -> None:
    with pytest.raises(UserError, match="no argument 'image_sise'; did you mean 'image_size'"):
        make(family, image_sise=32)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown model 'simple_unet_258'; did you mean 'simple_unet_25"):
        build("simple_unet_258")


# -- rewrites of the levels


@pytest.mark.parametrize("family", LEVELLED)
def test_unknown_level_lists_the_levels(family: str) -> None:
    levels = [v.resolution for v in TINY[family][1].levels]
    for argument in ("depth_at", "width_at"):
        with pytest.raises(
            UserError, match=rf"{argument}: no level of 5 px; this network has {levels}".replace("[", r"\[")
        ):
            make(family, **{argument: {5: 3}})


@pytest.mark.parametrize("family", [k for k, (_, c) in TINY.items() if not hasattr(c, "levels") and k != "DiMR"])
def test_families_without_levels_refuse_by_name(family: str) -> None:
    with pytest.raises(UserError, match="has no resolution levels, so depth_at does not apply"):
        make(family, depth_at={16: 2})


@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_depth_must_be_a_positive_whole_number(value: object) -> None:
    with pytest.raises(UserError, match="depth_at: expected a positive whole number at 8 px"):
        make("SimpleUNet", depth_at={8: value})


def dropouts(net: Network) -> dict[int, int]:
    """Number of dropout layers by resolution in pixels."""
    counts: dict[int, int] = {}
    levels = net.config.levels
    for name, module in net.named_modules():
        if isinstance(module, nn.Dropout):
            way, index = name.split(".")[:2]
            level = levels[-1] if way == "middle" else levels[int(index)]
            assert module.p == level.dropout
            counts[level.resolution] = counts.get(level.resolution, 0) + 1
    return counts


def test_dropout_sits_where_the_config_says() -> None:
    def unet(**overrides: object) -> dict[int, int]:
        with torch.device("meta"):
            return dropouts(build("simple_unet_128", **overrides))

    below = {16: 12 + 13, 8: 4 + 5 + 2}  # down + up, and two in the middle
    assert unet() == below
    assert unet(dropout_from_resolution=32) == {32: 4 + 5, **below}
    assert unet(dropout=0.3, dropout_from_resolution=8) == {8: 11}
    assert unet(dropout=0.0) == {}
    assert unet(dropout_from_resolution=128) == {128: 3 + 4, 64: 4 + 5, 32: 4 + 5, **below}
    assert unet(depth_at={16: 2}) == {16: 2 + 3, 8: 11}


@pytest.mark.parametrize(("name", "count"), [("simple_uvit_256", 72), ("simpler_uvit_128", 32)])
def test_dropout_of_the_uvits_is_in_the_transformer_only(name: str, count: int) -> None:
    with torch.device("meta"):
        assert dropouts(build(name)) == {16: count}
        wider = dropouts(build(name, dropout_from_resolution=32))
    assert wider.keys() == {16, 32}


@every_family
def test_dropout_acts_in_training_alone(family: str) -> None:
    if family.startswith("UViTBao"):  # whose code has none
        with pytest.raises(UserError, match="no argument 'dropout'"):
            make(family, dropout=0.25)
        return
    deep = {"depth": 4} if family == "DiT-head" else {}  # dropout sits in the middle half of the blocks
    net, none = make(family, dropout=0.25, **deep), make(family, dropout=0.0, **deep)
    probabilities = [m.p for m in net.modules() if isinstance(m, nn.Dropout) and m.p]
    assert set(probabilities) == {0.25}
    assert not any(isinstance(m, nn.Dropout) and m.p for m in none.modules())
    given = inputs(net)
    with torch.no_grad():
        assert not torch.equal(net(*given), net(*given))
        torch.testing.assert_close(net.eval()(*given), none(*given), rtol=1e-3, atol=1e-6)  # EDM2 normalises weights


def test_dropout_out_of_range() -> None:
    with pytest.raises(UserError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        make("SimpleUNet", dropout=1.0)


def test_image_size_scales_the_levels() -> None:
    def resolutions(name: str, **overrides: object) -> list[int]:
        return [v.resolution for v in entry(name).config.override(**overrides).levels]

    assert resolutions("simple_unet_256", image_size=512) == [512, 256, 128, 64, 32, 16]
    assert resolutions("simple_uvit_128", image_size=256, input_transform="patch-2") == [128, 64, 32, 16]
    assert resolutions("simpler_uvit_p2_256", input_transform="none") == [256, 128, 64, 32]
    flop_heavy = entry("simpler_uvit_p2_256").config.override(input_transform="none")
    assert flop_heavy == entry("simpler_uvit_p1_256").config
    with pytest.raises(UserError, match="image_size 100 does not divide by 8"):
        resolutions("simple_uvit_256", image_size=100, input_transform="dwt-3")
    with pytest.raises(UserError, match=r"image_size 200 does not divide down .* choose a multiple of 16"):
        resolutions("simple_uvit_256", image_size=200)


def test_ablation_of_early_downsampling_is_one_argument_or_name() -> None:
    wavelet = entry("simple_unet_512").config
    assert wavelet.override(input_transform="patch-4").levels == wavelet.levels
    assert [v.resolution for v in entry("simple_unet_512_full").config.levels][-1] == 8
    half = entry("simple_unet_512_dwt1").config
    assert half.override(input_transform="patch-2").levels == half.levels


def test_levels_that_do_not_fit_are_refused() -> None:
    tiny = TINY["SimpleUNet"][1]
    with pytest.raises(UserError, match="first level must have 32 px"):
        SimpleUNet(replace(tiny, image_size=32))
    with pytest.raises(UserError, match="half the pixels"):
        SimpleUNet(replace(tiny, levels=(tiny.levels[0], replace(tiny.levels[1], resolution=4))))
    with pytest.raises(UserError, match="at least one level"):
        SimpleUNet(SimpleUNetConfig())
    with pytest.raises(UserError, match="simple_uvit_t2i"):
        SimpleUNet(replace(tiny, text_width=8))


# -- captions


def test_null_caption_ignores_the_text_and_masked_tokens_are_not_seen() -> None:
    net = make("SimpleUViT-text").eval()
    z, level, cond = inputs(net)
    with torch.no_grad():
        null = net(z, level, net.null_condition(cond))
        zeros = torch.zeros(cond.text.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(net(z, level, replace(cond, text_mask=zeros)), null)
        mask = torch.ones_like(zeros)
        mask[:, 5:] = False
        short = Condition(text=cond.text[:, :5])
        torch.testing.assert_close(net(z, level, replace(cond, text_mask=mask)), net(z, level, short))
        assert (net(z, level, short) - null).abs().max() > 1e-5


# -- structure


def test_residual_skip_of_the_successor() -> None:
    """With blocks and projections that do nothing, h = up(mid - low) + before leaves the features as they were."""
    net = make("SimplerUViT", perturb=False)
    x = torch.randn(1, 8, 16, 16)
    seen = []
    net.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.conv_in.register_forward_hook(lambda *_: x)
    for position in net.modules():
        if type(position).__name__ == "PositionTable":
            nn.init.zeros_(position.table)
    for grow in net.grow:
        nn.init.zeros_(grow.conv.bias)
    net(*inputs(net, 1))
    torch.testing.assert_close(seen[0], x)


def test_unet_uses_every_skip_once() -> None:
    """Each fused skip is an output of the way down, in reverse order, the levels' inputs included."""
    net = make("SimpleUNet").eval()
    made, used = [], []
    down = {id(b) for stage in net.down for b in stage.blocks}
    for module in (net.conv_in, *net.shrink, *(m for m in net.modules() if id(m) in down)):
        module.register_forward_hook(lambda _m, _a, y: made.append(y))
    for stage in net.up:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda _m, args: used.append(args[2]))
    net(*inputs(net))
    assert [id(t) for t in reversed(made)] == [id(t) for t in used]
