"""Conditioning of the blocks: noise level and class as one vector, positions, caption tokens."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.nn.norms import zeroed
from diffzoo.typing import Labels, Mask, NoiseLevel, Tokens, Vectors

__all__ = [
    "CaptionTokens",
    "Film",
    "NoiseLevelEmbedding",
    "PositionTable",
    "cosine_sine",
    "frequencies",
    "resample_grid",
    "sine_cosine_table",
    "sinusoid",
]


def sinusoid(position: NoiseLevel, channels: int, max_period: float = 10_000.0) -> Vectors:
    """Sines and cosines of `position` `(b,)`, `(b, channels)`, at geometrically spaced frequencies 1 to 1/max_period.

    Computed in float32 without a stored table, so that a network built on the meta device has nothing to restore.
    """
    half = channels // 2
    step = -math.log(max_period) / max(half - 1, 1)
    frequencies = torch.exp(step * torch.arange(half, device=position.device, dtype=torch.float32))
    angles = position.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def cosine_sine(t: NoiseLevel, width: int, period: float = 10_000.0) -> Vectors:
    """`(b,)` to `(b, width)`, float32: cosines, then sines, of t at frequencies 1 to 1/period; odd widths end in 0."""
    half = width // 2
    # multiply before dividing: angles reach 1000, where another rounding of the frequencies costs the fifth digit
    exponent = -math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(exponent)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


def frequencies(count: int, device: torch.device | str | None = None) -> Float[Tensor, "f"]:
    """10000^(-j / count) for j < count, in the widest type of the device."""
    wide = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    return 10000 ** -(torch.arange(count, device=device, dtype=wide) / count)


def sine_cosine_table(
    rows: int, columns: int, channels: int, device: torch.device | str | None = None
) -> Float[Tensor, "n d"]:
    """Fixed positions `(rows columns, channels)`, float32, row by row.

    Sines and cosines of the column, then of the row: the order of every transformer that descends from DiT
    (arXiv:2212.09748).
    """
    f = frequencies(channels // 4, device)

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, device=device)[:, None] * f
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = waves(rows).repeat_interleave(columns, 0), waves(columns).repeat(rows, 1)
    return torch.cat([column, row], dim=1).float()


class NoiseLevelEmbedding(nn.Module):
    """A noise level and, where there are classes, a label as one vector `(b, channels)`.

    The level is read linearly: `value_range` is mapped to [0, 1000] (values beyond it are served too), then sinusoid,
    linear, SiLU, linear. The class vector is added.

    Args:
        channels: even width of the embedding.
        value_range: the noise levels mapped to the two ends; (-10, 10) is usual for log-SNR.
        class_rows: rows of the class table, the null class included; 0 = no classes.
    """

    def __init__(self, channels: int, value_range: tuple[float, float], class_rows: int = 0):
        super().__init__()
        self.channels, self.value_range = channels, value_range
        self.linear1 = nn.Linear(channels, channels)
        self.linear2 = nn.Linear(channels, channels)
        self.classes = nn.Embedding(class_rows, channels) if class_rows else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.05)

    def forward(self, noise_level: NoiseLevel, label: Labels | None = None) -> Vectors:
        low, high = self.value_range
        position = 1000.0 * (noise_level.float() - low) / (high - low)
        wave = sinusoid(position, self.channels).to(self.linear1.weight.dtype)
        vector: Tensor = self.linear2(F.silu(self.linear1(wave)))
        return vector if self.classes is None else vector + self.classes(label)


class Film(nn.Module):
    """Scale and shift of features by a linear function of the embedding; starts as the identity.

    Args:
        embedding: width of the conditioning vector.
        channels: width of the features.
    """

    def __init__(self, embedding: int, channels: int):
        super().__init__()
        self.linear = zeroed(nn.Linear(embedding, 2 * channels))

    def forward(self, emb: Vectors) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
        """(1 + scale, shift), each `(b, channels)`."""
        scale, shift = self.linear(F.silu(emb)).chunk(2, dim=1)
        return scale + 1, shift


class PositionTable(nn.Module):
    """One learned vector per cell of a grid, resampled for another one (`resample_grid`).

    Args:
        grid: rows and columns that the table is for.
        channels: of the tokens.
    """

    def __init__(self, grid: tuple[int, int], channels: int):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(grid[0] * grid[1], channels))
        nn.init.normal_(self.table, std=0.01)

    def forward(self, x: Tokens, grid: tuple[int, int]) -> Tokens:
        """Tokens of a grid `(b, rows columns, c)` with their positions added."""
        return x + resample_grid(self.table, self.grid, grid)


def resample_grid(
    table: Float[Tensor, "*b n c"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "*b m c"]:
    """Learned positions of one grid for another: bicubic, with antialiasing on the way down; itself where they agree.

    Each cell keeps its relative place in the image. Computed in float32.
    """
    if old == new:
        return table
    maps = table.reshape(-1, *old, table.shape[-1]).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    return maps.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new[0] * new[1], -1).to(table.dtype)


class CaptionTokens(nn.Module):
    """Caption embeddings `(b, n, text_width)` as keys for cross-attention, with a learned token for "no caption" first.

    The learned token is always visible. With a mask that hides every text token it is all there is: the null caption
    of classifier-free guidance; and no row of the attention is ever empty.
    """

    def __init__(self, text_width: int, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.linear = nn.Linear(text_width, channels)
        self.null = nn.Parameter(torch.empty(channels))
        nn.init.normal_(self.null, std=0.02)

    def forward(self, text: Tokens, mask: Mask | None = None) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"]]:
        """Tokens `(b, 1 + n, channels)` and which of them are visible `(b, 1 + n)`."""
        weight = self.linear.weight
        tokens = self.linear(self.norm(text.to(weight.dtype)))
        null = self.null.to(tokens.dtype).expand(len(text), 1, -1)
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return torch.cat([null, tokens], dim=1), F.pad(mask, (1, 0), value=True)
