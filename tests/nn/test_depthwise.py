"""The depthwise convolution in 16 bits: values of plain autocast, gradients as of float32."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffzoo.nn.depthwise import DepthwiseConv2d


def gradients(conv, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    (conv(x) * weights).sum().backward()
    return x.grad, conv.weight.grad, conv.bias.grad


def one(channels: int = 12, size: int = 10) -> tuple[DepthwiseConv2d, Tensor, Tensor]:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(channels, 7)
    return conv, torch.randn(2, channels, size, size), torch.randn(2, channels, size, size)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_sixteen_bits_differ_by_rounding_alone(stored: torch.dtype) -> None:
    """Weights in float32 under autocast, or stored in bfloat16: against float64 on the same rounded numbers."""
    conv, x, weights = one()
    x, weights = x.bfloat16(), weights.bfloat16()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(parameter.bfloat16())
    exact = DepthwiseConv2d(12, 7).double()
    exact.load_state_dict(conv.state_dict())
    expected = gradients(exact, x.double(), weights.double())
    conv.to(stored)
    with torch.autocast("cpu", torch.bfloat16) if stored == torch.float32 else nullcontext():
        assert conv(x).dtype == torch.bfloat16
        found = gradients(conv, x, weights)
    assert [g.dtype for g in found] == [torch.bfloat16, stored, stored]
    # float32 arithmetic on exact inputs leaves 1e-6; a bfloat16 number has 8 bits
    limits = (1e-2, 1e-5, 1e-5) if stored == torch.float32 else (1e-2, 4e-3, 4e-3)
    for got, want, limit in zip(found, expected, limits, strict=True):
        assert float((got.double() - want).abs().max() / want.abs().max()) < limit


def test_forward_is_that_of_plain_autocast() -> None:
    conv, x, _ = one()
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv2d(x, conv.weight, conv.bias, padding=3, groups=12)
        assert torch.equal(conv(x), plain)
        with torch.no_grad():
            assert torch.equal(conv(x), plain)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=3, groups=12))


def test_frozen_weights_and_frozen_inputs() -> None:
    """Fine-tuning freezes either."""
    conv, x, _ = one()
    conv.requires_grad_(False)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None
    conv.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        conv(x.detach()).sum().backward()
    assert conv.weight.grad is not None
    assert conv.bias.grad is None


def test_compiled_gives_the_same_gradients() -> None:
    conv, x, weights = one()
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(conv, x, weights)
        conv.zero_grad()
        conv.compile()
        compiled = gradients(conv, x, weights)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
