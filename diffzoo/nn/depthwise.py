"""A depthwise convolution whose weight gradient is quick on CPUs in low precision."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffzoo.nn.vit_layers import Conv2d

__all__ = ["DepthwiseConv2d"]


class _WideWeightGradient(torch.autograd.Function):
    """Convolution in the precision of `x`, which has 16 bits, with a weight gradient computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, narrow)
        ctx.padding = padding
        return torch.conv2d(x, narrow, bias.to(x.dtype), padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, narrow = ctx.saved_tensors
        groups = len(weight)
        rest = [groups], [1, 1], ctx.padding, [1, 1], False, [0, 0], groups
        gradient = torch.ops.aten.convolution_backward
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = gradient(grad, x, narrow, *rest, [True, False, False])[0]
        if any(ctx.needs_input_grad[1:3]):
            _, gw, gb = gradient(grad.float(), x.float(), weight.float(), *rest, [False, True, True])
            gw, gb = gw.to(weight.dtype), gb.to(weight.dtype)
        return gx, gw, gb, None


class DepthwiseConv2d(Conv2d):
    """A convolution of each channel with its own kernel, `(b, c, h, w)` to the same shape.

    oneDNN's weight gradient of such a convolution takes 2.6 times as long in bfloat16 as in float32 (7x7, 480
    channels), longer than all else in its block. So on CPUs it is computed in float32 where the convolution has 16
    bits, which is more exact too; derivatives of the gradient are not available there.

    Args:
        channels: in and out.
        kernel_size: odd.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(b, c, h, w)`."""
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        working = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if working not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        assert self.bias is not None
        padding = (self.kernel_size[0] // 2,) * 2
        with torch.autocast("cpu", enabled=False):
            out: Tensor = _WideWeightGradient.apply(x.to(working), self.weight, self.bias, padding)
        return out
