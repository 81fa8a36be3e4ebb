"""The denoiser's x_hat at each step, as a contact sheet or a GIF."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.images import make_grid, to_uint8, write_gif
from diffzoo.sampling.loop import Moment

__all__ = ["Trajectory"]


class Trajectory:
    """Collects x_hat, for `sample(..., trajectory=Trajectory())`.

    Images are kept as raw pixels on the CPU, so 16 images of 256 x 256 over 50 steps take 150 MB.

    Args:
        every: keep each `every`-th step, and the finished images always.
        decode: latents to images in [-1, 1]; None where x_hat are images.
        images: keep the first so many images of the run.
    """

    def __init__(self, every: int = 1, decode: Callable[[Tensor], Tensor] | None = None, images: int = 16):
        if every < 1 or images < 1:
            raise UserError(f"expected every >= 1 and images >= 1, got {every} and {images}")
        self.every, self.decode, self.images = every, decode, images
        self._pixels: dict[int, dict[int, Tensor]] = {}  # step, -1 for the finished images: image: pixels

    def __call__(self, moment: Moment) -> None:
        """Take note of one step of one batch; a batch that is tried again replaces what was noted of it."""
        rows = [row for row in moment.rows if row < self.images]
        if not rows or (moment.step >= 0 and moment.step % self.every):
            return
        x = moment.x_hat[: len(rows)].float()
        pixels = to_uint8(x if self.decode is None else self.decode(x)).cpu()
        self._pixels.setdefault(moment.step, {}).update(zip(rows, pixels, strict=True))

    def enlarging(self) -> "Trajectory | None":
        """What follows the upsampler of a cascade, once the small images are finished; None = nothing does."""
        return None

    def frames(self) -> list[Tensor]:
        """Raw pixels `(n, c, h, w)` for each step that was kept, from noise to the finished images."""
        if not self._pixels:
            raise UserError("this trajectory is empty: hand it to sample(..., trajectory=...) first")
        return [torch.stack([pixels for _, pixels in sorted(found.items())]) for found in self._pixels.values()]

    def contact_sheet(self, labels: Sequence[str] = ()) -> UInt8[Tensor, "3 H W"]:
        """A row per image, a column per step under its number; the labels stand below the finished images."""
        frames = torch.stack(self.frames(), dim=1)
        below = [label for text in labels[: len(frames)] for label in [""] * (frames.shape[1] - 1) + [text]]
        heads = ["image" if step < 0 else f"step {step}" for step in self._pixels]
        return make_grid(frames.flatten(0, 1), columns=frames.shape[1], labels=below, heads=heads)

    def save_gif(
        self, path: str | os.PathLike[str], columns: int = 4, milliseconds: int = 80, labels: Sequence[str] = ()
    ) -> Path:
        """Write an animation of the grid of images; the finished one stays for a second and a half.

        Args:
            path: ends in .gif.
            columns: images per row.
            milliseconds: that a step is shown.
            labels: what to write below each image.

        Raises:
            UserError: if the file cannot be written.
        """
        grids = [make_grid(frame, min(columns, len(frame)), labels=labels[: len(frame)]) for frame in self.frames()]
        return write_gif(path, grids, [milliseconds] * (len(grids) - 1) + [1500])
