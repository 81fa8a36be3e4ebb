"""A depthwise convolution whose weight gradient is quick on CPUs, in low precision and compiled too."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffzoo.nn.vit_layers import Conv2d

__all__ = ["DepthwiseConv2d"]


# An operator of its own, so that a compiler leaves its inputs in the layout that is quick.
@torch.library.custom_op("diffzoo::depthwise_weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The gradients of a depthwise convolution's weight and bias, computed in float32 on channels that lie last."""
    grad, x = (tensor.float().contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
    rest = _geometry(weight, padding)
    _, gw, gb = torch.ops.aten.convolution_backward(grad, x, weight.float(), *rest, [False, True, True])
    # contiguous: the strides of size-one dimensions are anyone's choice, and a compiler wants them as promised
    return gw.to(weight.dtype).reshape(-1).clone().view(weight.shape), gb.to(weight.dtype)


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _geometry(weight: Tensor, padding: int) -> tuple[Any, ...]:
    """What `convolution_backward` wants to know: bias, stride, padding, dilation, transposed, groups."""
    return [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0], len(weight)


class _Depthwise(torch.autograd.Function):
    """Convolution in the precision of `x`, with the weight gradient above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, narrow)
        ctx.padding = padding
        return torch.conv2d(x, narrow, bias.to(x.dtype), padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, narrow = ctx.saved_tensors
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            rest = _geometry(weight, ctx.padding)
            gx = torch.ops.aten.convolution_backward(grad, x, narrow, *rest, [True, False, False])[0]
        if any(ctx.needs_input_grad[1:3]):
            gw, gb = _weight_gradient(grad, x, weight, ctx.padding)
        return gx, gw, gb, None


class DepthwiseConv2d(Conv2d):
    """A convolution of each channel with its own kernel, `(b, c, h, w)` to the same shape.

    The weight gradient of such a convolution is slow on CPUs: in bfloat16 2.6 times as slow as in float32 (7x7, 480
    channels), longer than all else in its block, and again twice as slow where a compiler puts channels first. So on
    CPUs it is computed in float32 with channels last wherever the convolution has 16 bits or is compiled; derivatives
    of the gradient are not available there.

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
        if working not in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = _Depthwise.apply(x.to(working), self.weight, self.bias, self.kernel_size[0] // 2)
        return out
