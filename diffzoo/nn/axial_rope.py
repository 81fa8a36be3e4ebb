"""Rotary positions on a grid of any shape, with learned frequencies per head, and the query-key norm that goes with it.

The design is that of hourglass transformers (arXiv:2401.11605): half of the channel pairs turn with the row, half with
the column; positions are cell centres in [-1, 1] on the longer side, so that a smaller or longer grid needs no new
parameters; attention is cosine similarity with a learned temperature per head.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.nn.embeddings import frequencies

__all__ = ["AxialRotary", "QueryKeyNorm", "axial_positions", "grid_angles", "rotate_pairs"]

Positions = Float[Tensor, "n 2"]
Heads = Float[Tensor, "b heads n d"]


def axial_positions(rows: int, columns: int, device: torch.device | str | None = None) -> Positions:
    """Centres (row, column) of the cells of a grid, `(rows * columns, 2)`, row by row.

    The longer side spans [-1, 1], the shorter one as much as keeps cells square.
    """
    longest = max(rows, columns)

    def centres(n: int) -> Tensor:
        return (2 * torch.arange(n, device=device, dtype=torch.float32) + 1 - n) / longest

    return torch.cartesian_prod(centres(rows), centres(columns))


def rotate_pairs(
    x: Float[Tensor, "*b d"], cos: Float[Tensor, "*angles"], sin: Float[Tensor, "*angles"]
) -> Float[Tensor, "*b d"]:
    """Turn the channel pairs (2i, 2i + 1) of `x` by angles given as cosines and sines, `(..., d / 2)`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def grid_angles(
    rows: int, columns: int, head_width: int, device: torch.device | str | None = None
) -> Float[Tensor, "n pairs"]:
    """Angles of RoPE on a grid, `(rows columns, head_width / 2)` (arXiv:2104.09864, in two dimensions).

    The first half turns with the row, the second with the column, at frequencies 1 to 1/10000; positions are whole
    numbers from 0.
    """
    f = frequencies(head_width // 4, device)
    row = torch.arange(rows, device=device)[:, None] * f
    column = torch.arange(columns, device=device)[:, None] * f
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1).float()


class AxialRotary(nn.Module):
    """Rotate queries or keys by their position.

    Args:
        head_width: channels per head, a multiple of 4.
        heads: attention heads.
    """

    def __init__(self, head_width: int, heads: int):
        super().__init__()
        # the device is named because transformers 5 may have taken `linspace` out of what `with torch.device` reaches
        device = torch.get_default_device()
        start = torch.linspace(math.log(math.pi), math.log(5 * math.pi), head_width // 4, device=device)
        self.log_frequencies_row = nn.Parameter(start.expand(heads, -1).clone())
        self.log_frequencies_column = nn.Parameter(start.expand(heads, -1).clone())

    def forward(self, x: Heads, positions: Positions) -> Heads:
        """Turn channel pairs (2i, 2i + 1) of `x` `(b, heads, n, head_width)`; `positions` is `(n, 2)`."""
        row, column = positions[:, 0, None], positions[:, 1, None]
        angles = torch.cat(
            [
                row * self.log_frequencies_row.float().exp()[:, None],
                column * self.log_frequencies_column.float().exp()[:, None],
            ],
            dim=-1,
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return rotate_pairs(x, cos, sin)


class QueryKeyNorm(nn.Module):
    """Give queries and keys the length sqrt(temperature), one learned temperature per head.

    `exp(log_scale)` multiplies the cosine of query and key after the usual 1 / sqrt(head_width) of attention. It never
    exceeds 100: training projects `log_scale` back before each use, and the gradient is taken at the bound.

    Args:
        heads: attention heads.
    """

    limit = math.log(100)

    def __init__(self, heads: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(10.0)))

    def forward(self, x: Heads) -> Heads:
        """Normalise `x` `(b, heads, n, head_width)` over its last dimension."""
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=self.limit)
        log_scale = self.log_scale.float()
        # bounded value, gradient of the identity: weights that were never projected act as if they had been
        log_scale = log_scale - (log_scale - self.limit).clamp_min(0).detach()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.exp(log_scale / 2 - math.log(x.shape[-1]) / 4)[:, None, None]
        return (wide * (length * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6))).to(x.dtype)
