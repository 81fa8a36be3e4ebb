"""Randomness that is a function of names and counters, never of history.

`torch.manual_seed` gives every rank the same noise and is not part of a checkpoint. Here every random number of
training and sampling is a word of Philox (`philox.py`), keyed by what it is for and counted by the sample that it
belongs to. A resumed run repeats nothing and loses nothing, image `i` of a sampling run depends on seed `i` alone, and
both hold on every device: the numbers are the same bits on a CPU and on a GPU.

In training, the counter is the sample's place in the global stream (`normal`, `times`, `uniform`). Sample number p of
a run gets the same noise, time and condition dropout on one device or on sixty-four, in whatever micro-batch it lands,
and again after a resume. Ranks never share noise, since no two of them see the same p.

Times are spread evenly over any run of consecutive samples: t_p = frac(u + p / phi), phi the golden ratio. The
points of this sequence leave no gap wider than about 1.6 / n among n neighbours, so a batch of any size is stratified
(the low-discrepancy idea of arXiv:2107.00630, section I.1, without its dependence on the batch size).

`NOISE` names these numbers in plans, results and checkpoints. A change of any of them needs a new name.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffzoo import philox

__all__ = [
    "EARLIER_NOISE",
    "NOISE",
    "ImageNoise",
    "key",
    "keyed_generator",
    "normal",
    "places",
    "seed_layers",
    "times",
    "uniform",
]

NOISE = "philox"
EARLIER_NOISE = "torch.Generator"  # what drew the noise before it had a name

Places = Sequence[int] | Int[Tensor, " b"]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 1 / phi in 64 binary places, as a signed integer
_AHEAD = 1 << 18  # numbers that are drawn ahead at most


def key(*parts: int | str) -> int:
    """A 63-bit number that depends on all parts and their order, the same on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A fresh generator for the key `parts`, such as ("kid", seed, subset), where few are needed: those on a CPU tell
    2^32 keys apart."""
    return torch.Generator(device=device).manual_seed(key(*parts))


class ImageNoise:
    """Standard normal noise for a batch of images, each drawn from its own seed.

    An image's noise is the same whatever the device, the batch and its place there. The k-th call returns the k-th
    draw of each image. From the second call on, some draws are made ahead, since a small one costs as much as many.

    Args:
        seeds: one non-negative integer below 2**63 per image.
        device: where to draw.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.seeds = [int(s) for s in seeds]
        self.device = torch.device(device)
        self._places = places(self.seeds, self.device)
        self._ahead: list[Tensor] = []
        self._draw = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Sequence[int]) -> Float[Tensor, "b *shape"]:
        """Noise of `shape` per image."""
        shape = tuple(shape)
        if not self._ahead or self._ahead[-1].shape[1:] != shape:
            self._ahead = self._draws(shape)
        self._draw += 1
        return self._ahead.pop()

    def _draws(self, shape: tuple[int, ...]) -> list[Tensor]:
        """The next draws, the first of them last: three times as many as were made so far, where they are small."""
        n, size = len(self), math.prod(shape)
        count = max(1, min(3 * self._draw, _AHEAD // max(1, n * size)))
        draws = torch.arange(self._draw, self._draw + count, device=self.device)
        numbers = philox.normals(
            key("image"), self._places.repeat(count), draws.repeat_interleave(n, output_size=n * count), size
        )
        return list(numbers.reshape(count, n, *shape).unbind())[::-1]


def places(index: Places, device: torch.device) -> Int[Tensor, " b"]:
    """Places on a device, for `normal`, `times` and `uniform`; the host does not wait for it."""
    if isinstance(index, range):
        return torch.arange(index.start, index.stop, index.step, device=device)
    held = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64)
    if device.type == "cuda" and held.device.type == "cpu":
        held = held.pin_memory()
    return held.to(device, torch.int64, non_blocking=True)


def normal(
    purpose: str, seed: int, index: Places, shape: Sequence[int], device: torch.device
) -> Float[Tensor, "b *shape"]:
    """Standard normal noise, float32, one stream per sample.

    Args:
        purpose: what the noise is for; different purposes are independent.
        seed: the seed of the run.
        index: place of each sample in the global stream.
        shape: shape per sample.
        device: where to draw.
    """
    place = places(index, device)
    numbers = philox.normals(key(purpose, seed), place, torch.zeros_like(place), math.prod(shape))
    return numbers.reshape(len(place), *shape)


def times(seed: int, index: Places, device: torch.device) -> Float[Tensor, " b"]:
    """Times in [0, 1), float32, stratified over consecutive samples."""
    start = key("times", seed) * 2 - 2**63
    return _fraction((places(index, device) * _GOLDEN + start) >> 32)


def uniform(purpose: str, seed: int, index: Places, device: torch.device) -> Float[Tensor, " b"]:
    """Independent uniform numbers in [0, 1), float32."""
    place = places(index, device)
    zero = torch.zeros_like(place)
    return _fraction(philox.words(key(purpose, seed), zero, zero, place)[0])


def _fraction(word: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The highest 24 of the lowest 32 bits as a number in [0, 1): all that float32 holds without rounding up."""
    return ((word >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def seed_layers(seed: int, index: Places) -> None:
    """Seed PyTorch's own generators, from which dropout draws, by the places of a micro-batch.

    So a resumed run drops what the uninterrupted one did, and ranks drop differently. Unlike all else here, what is
    dropped depends on how a global batch is cut into micro-batches.
    """
    torch.manual_seed(key("layers", seed, int(index[0])))
