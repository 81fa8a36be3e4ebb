"""Layers of vision transformers with their first weights (normal, std 0.02, cut at 2; no bias), and long skips.

PyTorch's own layers draw uniform weights first, which a network would then draw again; and on the meta device, where
there is nothing to draw, the drawing alone costs more than building the network.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Conv2d", "Embedding", "Linear", "UnitEmbedding", "XavierLinear", "with_long_skips"]

Channels = Float[Tensor, "b *n d"]


def with_long_skips(
    run: Callable[..., Tensor],
    blocks: nn.ModuleList,
    fusions: nn.ModuleList,
    x: Channels,
    *inputs: object,
    keep: bool = False,
) -> list[Channels]:
    """Run blocks of which the last read the outputs of the first, in reverse order, beside their own input.

    Args:
        run: calls a block (`Network.run`).
        blocks: called with x and `inputs`.
        fusions: one linear layer `2 d -> d` for each block that reads another; none = no skips.
        x: tokens or maps with channels last.
        keep: return the outputs of all blocks instead of the last one's.
    """
    outputs: list[Tensor] = []
    early: list[Tensor] = []
    first = len(blocks) - len(fusions)
    for i, block in enumerate(blocks):
        if i >= first:
            x = fusions[i - first](torch.cat([x, early.pop()], dim=-1))
        x = run(block, x, *inputs)
        if i < len(fusions):
            early.append(x)
        if keep:
            outputs.append(x)
    return outputs if keep else [x]


class Linear(nn.Linear):
    """A linear layer; its bias starts at zero."""

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class XavierLinear(nn.Linear):
    """A linear layer with Xavier's uniform first weights; its bias starts at zero.

    Args:
        inputs, outputs: channels.
        std: first weights are normal with this standard deviation instead.
        zero: first weights are zero instead.
    """

    def __init__(self, inputs: int, outputs: int, std: float | None = None, zero: bool = False):
        self.std, self.zero = std, zero
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if self.weight.is_meta:
            return
        nn.init.zeros_(self.bias)
        if self.zero:
            nn.init.zeros_(self.weight)
        elif self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.xavier_uniform_(self.weight)


class Embedding(nn.Embedding):
    """A table of small vectors."""

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=0.02)


class Conv2d(nn.Conv2d):
    """A convolution with PyTorch's first weights."""

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            super().reset_parameters()


class UnitEmbedding(nn.Embedding):
    """A table of vectors with PyTorch's first weights, standard normal."""

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            super().reset_parameters()
