"""Magnitude-preserving layers: unit variance in, unit variance out, whatever the weights."""

import pytest
import torch
from torch import Tensor

from diffzoo.nn.magnitude import Fourier, MPConv2d, MPLinear, MPTable, join, mix, normalize, silu


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_layers_keep_the_variance_whatever_their_weights(size: float) -> None:
    torch.manual_seed(0)
    for layer, x in ((MPLinear(64, 256), normal(256, 64)), (MPConv2d(64, 64, 3), normal(8, 64, 32, 32))):
        with torch.no_grad():
            layer.weight.mul_(size)
            assert float(layer.eval()(x).std()) == pytest.approx(1, abs=0.05)


def test_mixing_joining_and_silu_keep_the_variance() -> None:
    a, b = normal(4, 16, 64, 64), torch.randn(4, 48, 64, 64, generator=torch.Generator().manual_seed(1))
    assert float(mix(a, b[:, :16], 0.3).std()) == pytest.approx(1, abs=0.02)
    assert float(silu(a).square().mean().sqrt()) == pytest.approx(1, abs=0.02)
    for t in (0.3, 0.5):
        joined = join(a, b, t)
        parts = joined[:, :16].square().sum(), joined[:, 16:].square().sum()
        assert float(joined.square().mean()) == pytest.approx(1, abs=0.02)
        assert float(parts[1] / parts[0]) == pytest.approx((t / (1 - t)) ** 2, rel=0.03)


def test_fourier_features_have_unit_variance() -> None:
    torch.manual_seed(0)
    features = Fourier(4096)(torch.linspace(-1, 1, 16))
    assert float(features.std()) == pytest.approx(1, abs=0.03)


def test_training_overwrites_the_weight_and_evaluation_does_not() -> None:
    layer, x = MPLinear(8, 4), normal(2, 8)
    with torch.no_grad():
        layer.weight.mul_(7)
    before = layer.weight.detach().clone()
    layer.eval()(x)
    assert torch.equal(layer.weight, before)
    layer.train()(x)
    torch.testing.assert_close(layer.weight.square().mean(1).sqrt(), torch.ones(4), rtol=2e-4, atol=0)
    torch.testing.assert_close(layer.weight, normalize(before))


def test_a_table_is_a_linear_layer_of_one_hot_vectors_and_knows_no_class() -> None:
    table, layer = MPTable(5, 8).eval(), MPLinear(5, 8).eval()
    layer.load_state_dict({"weight": table.weight.detach().T})
    vectors = table(torch.tensor([2, 5]))
    torch.testing.assert_close(vectors[:1], layer(torch.eye(5)[[2]] * 5**0.5))
    assert not vectors[1].any()
