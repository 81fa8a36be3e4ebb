"""Heights and widths: every network that says so serves images of any size, square or not."""

import pytest
import torch
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.models import (
    Network,
    adm,
    build,
    dimr,
    dit,
    edm2,
    pixnerd,
    simple_unet,
    simple_uvit,
    simpler_uvit,
    uvit_bao,
)
from diffzoo.models.summary import describe, example_inputs
from diffzoo.nn.axial_rope import grid_angles
from diffzoo.nn.embeddings import resample_grid, sine_cosine_table
from diffzoo.record import from_plain, to_plain
from diffzoo.sizes import as_size, mean_side, scaled, sides, size_text
from diffzoo.zoo.adapt import build_with
from diffzoo.zoo.building import Weights
from diffzoo.zoo.metadata import Metadata

FAMILIES = {
    "SimpleUNet": (simple_unet.SimpleUNet, simple_unet.TINY),
    "SimpleUViT": (simple_uvit.SimpleUViT, simple_uvit.TINY),
    "SimplerUViT": (simpler_uvit.SimplerUViT, simpler_uvit.TINY),
    "UViTBao": (uvit_bao.UViTBao, uvit_bao.TINY),
    "DiMR": (dimr.DiMR, dimr.TINY),
    "DiMR-rope": (dimr.DiMR, dimr.TINY.override(positions="axial_rope")),
    "ADMUNet": (adm.ADMUNet, adm.TINY),
    "EDM2UNet": (edm2.EDM2UNet, edm2.TINY),
    "PixNerd": (pixnerd.PixNerd, pixnerd.TINY),
    "DiT": (dit.DiT, dit.TINY),
    "JiT": (dit.DiT, dit.TINY_JIT),
    "DiT-head": (dit.DiT, dit.TINY_HEAD),
}
CONVOLVE = [name for name in FAMILIES if name not in ("DiT", "JiT", "DiT-head", "PixNerd")]
WAVELET = simple_uvit.TINY.override(input_transform="dwt-1", image_size=(32, 64))
HEADS = dimr.TINY.stages[0].heads
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, size: object) -> Network:
    """A network whose weights are all away from zero, in float64."""
    cls, config = FAMILIES[family]
    torch.manual_seed(0)
    network = cls(config.override(image_size=size)).double().eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network


def run(network: Network, z: Tensor) -> Tensor:
    torch.manual_seed(1)
    _, level, cond = example_inputs(network.config, len(z), "cpu")
    return network(z, level.double(), cond)


def rectangle(family: str) -> tuple[int, int]:
    side = min(FAMILIES[family][1].sides)
    return side, 2 * side


def noise(network: Network, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, network.config.in_channels, *size, generator=torch.Generator().manual_seed(2)).double()


def test_sizes_have_one_form() -> None:
    assert as_size([64, 64]) == as_size("64x64") == as_size("64") == 64
    assert as_size((96, 64)) == as_size(" 96 x 64") == (96, 64)
    assert (sides(64), size_text((96, 64)), scaled((12, 8), 8)) == ((64, 64), "96x64", (96, 64))
    assert mean_side((32, 8)) == 16 == mean_side(16)
    for wrong in (0, -4, True, 6.5, "64y", [1, 2, 3], [], None):
        with pytest.raises(UserError, match="image_size: expected a positive whole number, or height and width"):
            as_size(wrong)


@every_family
def test_a_config_of_a_rectangle_goes_to_plain_data_and_back(family: str) -> None:
    cls, config = FAMILIES[family]
    h, w = rectangle(family)
    wide = config.override(image_size=[h, w])
    assert wide.image_size == (h, w)
    assert from_plain(type(config), to_plain(wide)) == wide
    assert wide.override(image_size=(h, h)) == config or family.startswith("DiMR")  # whose tables stay large
    assert config.override(image_size=(h, h)) == config
    with pytest.raises(UserError, match="divide"):
        config.override(image_size=(h, w + 1)) if config.cell > 1 else cls(WAVELET.override(image_size=(32, 33)))


@every_family
def test_one_network_serves_every_size_as_if_it_had_been_built_for_it(family: str) -> None:
    square = make(family, rectangle(family)[0])
    metadata = Metadata(type(square), square.config)
    for size in (rectangle(family), rectangle(family)[::-1]):
        z = noise(square, size)
        built = build_with(Weights(square.state_dict(), metadata, "here"), {"image_size": size}).double().eval()
        assert built.config.sides == size
        assert run(square, z).shape[-2:] == size
        torch.testing.assert_close(run(built, z), run(square, z), rtol=1e-5, atol=1e-6)


def transposed(family: str, network: Network, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network that does to transposed images what `network` does to images."""
    tables, found = network.position_tables(), {}
    for name, value in state.items():
        if name in tables:
            extra, rows, columns = tables[name]
            head, cells = value[..., :extra, :], value[..., extra:, :]
            cells = cells.unflatten(-2, (rows, columns)).transpose(-3, -2).flatten(-3, -2)
            value = torch.cat([head, cells], dim=-2)
        elif value.ndim == 4:
            value = value.mT
        elif isinstance(network, uvit_bao.UViTBao) and name.startswith("head"):
            p = network.config.patch
            value = value.unflatten(0, (p, p, -1)).transpose(0, 1).flatten(0, 2)
        elif "upsample.expand" in name:
            value = value.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
        elif family == "DiMR-rope" and "qkv" in name:  # half of the channels of a head turn with the row
            q, k, v = value.unflatten(0, (3, HEADS, 2, -1)).unbind(0)
            value = torch.stack([q.flip(1), k.flip(1), v]).flatten(0, 3)
        swap = {"row": "column", "column": "row"}.get(name.rpartition("frequencies_")[2])
        found[name if swap is None else f"{name.rpartition('_')[0]}_{swap}"] = value
    return found


@pytest.mark.parametrize("family", CONVOLVE)
def test_a_transposed_network_makes_of_transposed_images_transposed_outputs(family: str) -> None:
    h, w = rectangle(family)
    wide, tall = make(family, (h, w)), make(family, (w, h))
    tall.load_state_dict(transposed(family, wide, wide.state_dict()))
    z = noise(wide, (h, w))
    torch.testing.assert_close(run(tall, z.mT).mT, run(wide, z))


@pytest.mark.parametrize("family", ["DiT", "JiT", "DiT-head"])
def test_where_tokens_do_not_meet_a_part_of_the_image_gives_a_part_of_the_output(family: str) -> None:
    network = make(family, rectangle(family)[1])
    for block in (*network.blocks, *network.head):
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.attention.out.bias)
    h, w = rectangle(family)
    z = noise(network, (w, w))
    torch.testing.assert_close(run(network, z[..., :h, :]), run(network, z)[..., :h, :])


def test_fixed_positions_of_a_rectangle_are_those_of_the_square_around_it() -> None:
    for table in (sine_cosine_table, grid_angles):
        square = table(6, 6, 16).unflatten(0, (6, 6))
        assert torch.equal(table(3, 6, 16), square[:3].flatten(0, 1))
        assert torch.equal(table(6, 3, 16), square[:, :3].flatten(0, 1))


def test_resampled_positions_keep_what_is_constant_along_a_side() -> None:
    ramp = torch.linspace(0, 1, 8)[:, None].expand(8, 4).reshape(32, 1)  # grows with the row alone
    wider = resample_grid(ramp, (8, 4), (8, 6)).reshape(8, 6)
    torch.testing.assert_close(wider, torch.linspace(0, 1, 8)[:, None].expand(8, 6))
    assert resample_grid(ramp, (8, 4), (8, 4)) is ramp


def test_a_network_of_one_size_says_so() -> None:
    network = adm.ADMClassifier(adm.TINY_CLASSIFIER)
    with pytest.raises(UserError, match=r"expected an input of shape \(b, 3, 16, 16\), got \(2, 3, 16, 32\)"):
        network(torch.zeros(2, 3, 16, 32), torch.zeros(2))


def test_summaries_count_what_a_rectangle_costs() -> None:
    square, wide = (describe("uvit_bao_s_32", depth=1, image_size=size) for size in (32, (32, 64)))
    assert "input          3 x 32 x 64" in str(wide)
    assert wide.parameters - square.parameters == 256 * 512
    assert 1.9 < wide.multiply_adds / square.multiply_adds < 2.2
    assert build("simple_uvit_xs_32", image_size="64x32").config.image_size == (64, 32)
    assert WAVELET.grid(WAVELET.levels[-1]) == (8, 16)
