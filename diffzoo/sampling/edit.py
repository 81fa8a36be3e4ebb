"""Sampling that begins with an image: image-to-image, inpainting, inversion, and interpolation of starts.

image-to-image   noise the image to a time on the sampler's grid and sample from there (arXiv:2108.01073)
inpainting       at each step replace the known pixels by the image at that noise level, go back and repeat
                 (arXiv:2201.09865, Algorithm 1)
inversion        walk DDIM's step up the grid; sampling from there gives the image back (arXiv:2105.05233, appendix F)
interpolation    along the great circle between two starts, which keeps the norm of noise
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.rng import ImageNoise
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.grids import Given
from diffzoo.sampling.loop import SampleOptions, Settled, initial_noise_scale, sample
from diffzoo.sampling.samplers import DDIM, Denoised, Noise, Sampler
from diffzoo.typing import Condition, Data, Latents, Time

__all__ = ["inpaint", "interpolate", "invert", "noised", "seed_noise", "shortened"]

FIRST = 3  # repetitions that find the noise of the first time of an inversion


def shortened(sampler: Sampler, process: GaussianProcess, strength: float) -> Sampler:
    """The sampler on the last part of its own grid.

    Args:
        sampler: any.
        process: what its grid is of.
        strength: share of the steps that are made, in (0, 1]; at least one is.

    Raises:
        UserError: for a strength out of range.
    """
    if not 0 < strength <= 1:
        raise UserError(f"expected a strength in (0, 1], got {strength}: small keeps the image, 1 replaces it")
    times = sampler.times(process)
    steps = max(1, round(strength * (len(times) - 1)))
    return replace(sampler, steps=steps, grid=Given(values=times[-steps - 1 :].tolist()))


def seed_noise(process: GaussianProcess, sampler: Sampler, seeds: Sequence[int], shape: Sequence[int]) -> Latents:
    """The states that sampling from some seeds starts with, `(n, c, h, w)`."""
    return ImageNoise(seeds).normal(shape) * initial_noise_scale(process, sampler.times(process)[0])


def noised(process: GaussianProcess, sampler: Sampler, x: Latents, seeds: Sequence[int]) -> Latents:
    """Clean data at the noise level where a sampler starts, with the noise of the seeds: a `start` for `sample`."""
    start = sampler.times(process)[0]
    return process.add_noise(x, ImageNoise(seeds).normal(x.shape[1:]), start).to(torch.float32)


class _Replacing:
    """A sampler whose steps put the known part of the images back at each noise level."""

    __hash__ = None  # type: ignore[assignment]  # otherwise the loop would cache it together with the images

    def __init__(self, sampler: Sampler, known: Latents, mask: Bool[Tensor, "b 1 h w"], resample: int):
        self.sampler, self.known, self.mask, self.resample = sampler, known, mask, resample
        self.clip, self.final, self.times, self.finish = sampler.clip, sampler.final, sampler.times, sampler.finish

    def rows(self, part: slice) -> "_Replacing":
        """For a part of the images."""
        return _Replacing(self.sampler, self.known[part], self.mask[part], self.resample)

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, object]:
        process = denoise.process
        if self.known.device != z.device:
            self.known, self.mask = self.known.to(z.device), self.mask.to(z.device)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.coefficients(t), process.coefficients(s)
        for left in reversed(range(self.resample)):
            unknown, after = self.sampler.step(denoise, z, t, s, memory, noise)
            known = process.add_noise(self.known, noise.normal(z.shape[1:]).to(z), s).to(z)
            there = torch.where(self.mask, unknown, known)
            if left:  # forward again: q(z_t | z_s)
                keep = alpha_t / alpha_s
                fresh = (sigma_t.square() - keep.square() * sigma_s.square()).clamp(min=0).sqrt()
                z = keep * there + fresh * noise.normal(z.shape[1:]).to(z)
        return there, after


def inpaint(
    denoise: Denoise,
    sampler: Sampler,
    x: Latents,
    mask: Shaped[Tensor, "*n rows columns"],
    seeds: Sequence[int],
    cond: Condition | None = None,
    *,
    resample: int = 10,
    **options: Unpack[SampleOptions],
) -> Latents:
    """New content where a mask is true, that goes with what is known elsewhere.

    Args:
        denoise: a denoiser, guided or not.
        sampler: how to step, and where. Multistep methods begin each repetition with the same memory.
        x: clean data, one per seed, `(n, c, h, w)`; what it holds where the mask is true does not matter.
        mask: true where to sample, `(h, w)` or `(n, 1, h, w)`.
        seeds: one per image.
        cond: what to sample, one row per image.
        resample: how often each step is made; each time but the last goes back to its start with fresh noise.
        options: of `sample`.

    Returns:
        Data `(n, c, h, w)`, float32, on the CPU; equal to x where the mask is false.

    Raises:
        UserError: for shapes that do not belong together, or `resample` below 1.
    """
    n = len(seeds)
    if len(x) != n or mask.shape[-2:] != x.shape[-2:] or resample < 1:
        raise UserError(
            f"expected {n} images and a mask of their size, each step made at least once, got images {tuple(x.shape)}, "
            f"a mask {tuple(mask.shape)} and resample={resample}"
        )
    mask = mask.bool().expand(n, 1, *x.shape[-2:])
    replacing = _Replacing(sampler, x, mask, resample)
    return torch.where(mask, sample(denoise, replacing, x.shape[1:], seeds, cond, **options), x.cpu())


@torch.no_grad()
def invert(
    denoise: Denoise,
    sampler: Sampler,
    x: Latents,
    cond: Condition | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Latents:
    """The state at the start of a sampler's grid from which DDIM comes back to some data.

    DDIM's step up the grid; first order, so with more steps of the grid it comes back more closely. Guidance above 1
    makes it worse.

    Args:
        denoise: a denoiser, guided or not.
        sampler: its grid is walked upwards.
        x: clean data `(n, c, h, w)`.
        cond: what it shows, one row per image.
        device: where to compute.

    Returns:
        A `start` for `sample`, `(n, c, h, w)`, float32, on the CPU.
    """
    process = denoise.process
    times = sampler.times(process).flip(0)
    if sampler.final == "x_hat":
        times = times[1:]  # the last step down ends at zero noise, so the first step up begins there
    step, settled = DDIM(), Settled(denoise, cond.to(device) if cond is not None else None)
    z = x.to(device)
    first = times[0]
    # from the data to the first time: the network's eps there is a fixed point, found by repetition
    eps = torch.zeros_like(z)
    for _ in range(FIRST):
        eps = settled(process.add_noise(z, eps, first).to(z), first).eps
    state = process.add_noise(z, eps, first).to(z)
    for t, s in pairwise(times):
        state, _ = step.step(settled, state, t, s, None, ImageNoise([]))
    return state.float().cpu()


def interpolate(
    a: Float[Tensor, "c h w"], b: Float[Tensor, "c h w"], weights: Sequence[float]
) -> Float[Tensor, "n c h w"]:
    """States between two, along the great circle through them (spherical interpolation).

    Args:
        a, b: one state each.
        weights: 0 = a, 1 = b.

    Returns:
        `(len(weights), c, h, w)`; of norms between those of a and b, where straight lines lose norm.
    """
    x, y = a.flatten().double(), b.flatten().double()
    cosine = (x @ y / (x.norm() * y.norm())).clamp(-1, 1)
    angle = torch.acos(cosine)
    if float(angle) < 1e-6:
        rows = [(1 - w) * a + w * b for w in weights]
    else:
        sine = torch.sin(angle)
        shares = [(torch.sin((1 - w) * angle) / sine, torch.sin(w * angle) / sine) for w in weights]
        rows = [float(p) * a + float(q) * b for p, q in shares]
    return torch.stack(rows)
