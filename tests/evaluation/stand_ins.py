"""Stand-ins for the evaluation tests: seeded images without a network, a small reference, a tiny network."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffzoo.evaluation import EvalProtocol, Reference, SamplePlan, make_reference
from diffzoo.metrics import load_features
from diffzoo.rng import ImageNoise

METRICS = tuple(
    f"{kind}:random-conv" for kind in ("frechet", "frechet-spatial", "precision", "recall", "density", "kid")
)


def smooth_images(seeds: range, size: int = 16, tint: float = 0.0) -> Tensor:
    """One smooth image in [-1, 1] per seed."""
    noise = ImageNoise(seeds).normal((3, 4, 4))
    return (torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear") * 0.5 + tint).clamp(-1, 1)


@dataclass
class StandInImages:
    """A source of images that keeps a log of what it was asked for.

    Args:
        log: a folder; every call leaves a file there, from whichever process.
        stop_at: raise when asked for this image, as if killed.
        tint: added to all pixels.
        size: in pixels.
    """

    log: str | None = None
    stop_at: int | None = None
    tint: float = 0.0
    size: int = 16
    nan_at: int | None = None

    def images(self, start: int, count: int) -> Tensor:
        if self.stop_at is not None and start <= self.stop_at < start + count:
            raise KeyboardInterrupt
        if self.log:
            (Path(self.log) / f"{start}_{count}").touch()
        images = smooth_images(range(start, start + count), self.size, self.tint)
        if self.nan_at is not None and start <= self.nan_at < start + count:
            images[self.nan_at - start, 0, 0, 0] = float("nan")
        return images

    def plan(self) -> SamplePlan:
        return SamplePlan(model=f"images-{self.tint}-{self.size}", labels="none")


def protocol(n: int = 150, **changes: object) -> EvalProtocol:
    settings = {"kid_subsets": 5, "kid_subset_size": 50}
    values = {"name": "test", "reference": "images", "n": n, "metrics": METRICS, "settings": settings}
    return EvalProtocol(**{**values, **changes})


def reference(folder: Path, n: int = 160, size: int = 16, tint: float = 0.05) -> Reference:
    batches = [
        ((smooth_images(range(10_000 + i, 10_000 + i + 40), size, tint) + 1) * 127.5).round().to(torch.uint8)
        for i in range(0, n, 40)
    ]
    return make_reference(batches, [load_features("random-conv")], folder / "reference.npz")
