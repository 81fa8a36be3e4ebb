"""The randomness of training: every draw is a function of the seed and of the sample's place in the global stream.

Sample number p of a run gets the same noise, time and condition dropout on one device or on sixty-four, in whatever
micro-batch it lands, and again after a resume. Ranks never share noise, since no two of them see the same p.

Times are spread evenly over any run of consecutive samples: t_p = frac(u + p / phi), phi the golden ratio. The
points of this sequence leave no gap wider than about 1.6 / n among n neighbours, so a batch of any size is stratified
(the low-discrepancy idea of arXiv:2107.00630, section I.1, without its dependence on the batch size).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffzoo.rng import key

__all__ = ["normal", "seed_layers", "times", "uniform"]

_GOLDEN = (5**0.5 - 1) / 2


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
