"""Randomness that is a function of names and counters, never of history.

`torch.manual_seed` gives every rank the same noise and is not part of a checkpoint. Here every draw of a training
step comes from a generator keyed by what it is for, so a resumed run repeats nothing and loses nothing, and image
`i` of a sampling run depends on seed `i` alone.

In training, every random number is a function of the seed and of the sample's place in the global stream (`normal`,
`times`, `uniform`). Sample number p of a run gets the same noise, time and condition dropout on one device or on
sixty-four, in whatever micro-batch it lands, and again after a resume. Ranks never share noise, since no two of them
see the same p.

Times are spread evenly over any run of consecutive samples: t_p = frac(u + p / phi), phi the golden ratio. The
points of this sequence leave no gap wider than about 1.6 / n among n neighbours, so a batch of any size is stratified
(the low-discrepancy idea of arXiv:2107.00630, section I.1, without its dependence on the batch size).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ImageNoise", "key", "keyed_generator", "normal", "seed_layers", "times", "uniform"]

_GOLDEN = (5**0.5 - 1) / 2


def key(*parts: int | str) -> int:
    """A 63-bit number that depends on all parts and their order, the same on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A fresh generator on `device` for the key `parts`, such as ("noise", seed, step, rank)."""
    return torch.Generator(device=device).manual_seed(key(*parts))


class ImageNoise:
    """Standard normal noise for a batch of images, each drawn from its own seed.

    Draws are made on the CPU and moved, so that a picture is the same on every device, whatever the batch size and
    its order. The k-th call returns the k-th draw of each image.

    Args:
        seeds: one non-negative integer below 2**63 per image.
        device: where the draws go.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.seeds = [int(s) for s in seeds]
        self.device, self.dtype = device, dtype
        # the CPU generator keeps only 32 bits of a seed: small seeds stay distinct, large ones are hashed first
        self._generators = [torch.Generator().manual_seed(s if s < 2**32 else key("image", s)) for s in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Noise of `shape` per image: `(b, *shape)`."""
        # in float32 whatever torch's default is: a draw in float64 is another draw
        draws = [torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in self._generators]
        empty = torch.empty(0, *shape)
        return (torch.stack(draws) if draws else empty).to(self.device, self.dtype)


def _unit(*parts: int | str) -> float:
    return key(*parts) / 2**63


def normal(purpose: str, seed: int, index: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise `(b, *shape)`, float32, drawn on `device`, one stream per sample.

    Args:
        purpose: what the noise is for; different purposes are independent.
        seed: the seed of the run.
        index: place of each sample in the global stream.
        shape: shape per sample.
        device: where to draw. CPU and GPU generators differ; each is reproducible.
    """
    # inside a step of bf16-true Lightning makes bfloat16 the default
    noise = torch.empty((len(index), *shape), device=device, dtype=torch.float32)
    generator = torch.Generator(device=device)
    for i, p in enumerate(index):
        generator.manual_seed(key(purpose, seed, p))
        torch.randn(tuple(shape), generator=generator, out=noise[i])
    return noise


def times(seed: int, index: Sequence[int], device: torch.device) -> Tensor:
    """Times in [0, 1), `(b,)` float32, stratified over consecutive samples."""
    start = _unit("times", seed)
    return torch.tensor([(start + p * _GOLDEN) % 1.0 for p in index], dtype=torch.float32).to(device)


def uniform(purpose: str, seed: int, index: Sequence[int], device: torch.device) -> Tensor:
    """Independent uniform numbers in [0, 1), `(b,)` float32."""
    return torch.tensor([_unit(purpose, seed, p) for p in index], dtype=torch.float32).to(device)


def seed_layers(seed: int, index: Sequence[int]) -> None:
    """Seed PyTorch's own generators, from which dropout draws, by the places of a micro-batch.

    So a resumed run drops what the uninterrupted one did, and ranks drop differently. Unlike all else here, what is
    dropped depends on how a global batch is cut into micro-batches.
    """
    torch.manual_seed(key("layers", seed, int(index[0])))
