"""Randomness that is a function of names and counters, never of history.

`torch.manual_seed` gives every rank the same noise and is not part of a checkpoint. Here every draw of a training
step comes from a generator keyed by what it is for, so a resumed run repeats nothing and loses nothing, and image
`i` of a sampling run depends on seed `i` alone.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ImageNoise", "key", "keyed_generator"]


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
