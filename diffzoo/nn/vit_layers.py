"""Linear and embedding layers with the first weights of vision transformers: normal, std 0.02, cut at 2; no bias.

PyTorch's own layers draw uniform weights first, which a network would then draw again; and on the meta device, where
there is nothing to draw, the drawing alone costs more than building the network.
"""

from torch import nn

__all__ = ["Conv2d", "Embedding", "Linear", "UnitEmbedding"]


class Linear(nn.Linear):
    """A linear layer; its bias starts at zero."""

    def reset_parameters(self) -> None:
        """Draw the first weights."""
        if not self.weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


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
