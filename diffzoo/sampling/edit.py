"""Sampling that begins with an image: image-to-image, inpainting, inversion, and interpolation of starts.

image-to-image   noise the image to a time on the sampler's grid and sample from there (arXiv:2108.01073)
inpainting       at each step replace the known pixels by the image at that noise level, go back and repeat
                 (arXiv:2201.09865, Algorithm 1)
inversion        walk DDIM's step up the grid; sampling from there gives the image back (arXiv:2105.05233, appendix F)
interpolation    along the great circle between two starts, which keeps the norm of noise
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.progress import progress_bar
from diffzoo.rng import ImageNoise
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.grids import Given
from diffzoo.sampling.guidance import rows_of
from diffzoo.sampling.loop import Moment, Precision, autocast, initial_noise_scale, integrate
from diffzoo.sampling.samplers import DDIM, Denoised, Noise, Sampler
from diffzoo.typing import Condition, Data, Latents, Time

__all__ = ["inpaint", "interpolate", "invert", "noised", "seed_noise", "shortened"]


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
    """A sampler whose steps put the known part of the image back at each noise level, for one batch."""

    def __init__(self, sampler: Sampler, known: Tensor, mask: Tensor, resample: int):
        self.sampler, self.known, self.mask, self.resample = sampler, known, mask, resample

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: Any, noise: Noise) -> tuple[Data, Any]:
        process = denoise.process
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


@torch.no_grad()
def inpaint(
    denoise: Denoise,
    sampler: Sampler,
    x: Latents,
    mask: Tensor,
    seeds: Sequence[int],
    cond: Condition | None = None,
    *,
    start: Latents | None = None,
    resample: int = 10,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    precision: Precision | None = None,
    progress: bool | None = False,
    trajectory: Callable[[Moment], object] | None = None,
) -> Latents:
    """New content where a mask is true, that goes with what is known elsewhere.

    Args:
        denoise: a denoiser, guided or not.
        sampler: how to step, and where. Multistep methods begin each repetition with the same memory.
        x: clean data, one per seed, `(n, c, h, w)`; what it holds where the mask is true does not matter.
        mask: true where to sample, `(h, w)` or `(n, 1, h, w)`.
        seeds: one per image.
        cond: what to sample, one row per image.
        start: the state at the start of the grid; default: noise from the seeds.
        resample: how often each step is made; each time but the last goes back to its start with fresh noise.
        device: where to compute.
        batch_size: images at a time; default all at once.
        precision, progress, trajectory: as for `sample`.

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
    start = seed_noise(denoise.process, sampler, seeds, x.shape[1:]) if start is None else start
    done = []
    for i in range(0, n, batch_size or max(n, 1)):
        part = slice(i, i + (batch_size or n))
        noise = ImageNoise(seeds[part], device)
        noise.normal(x.shape[1:])  # the first draw is that of the start
        replacing: Any = _Replacing(sampler, x[part].to(device), mask[part].to(device), resample)
        rows = cond[part].to(device) if cond is not None else None
        which, first = range(i, min(i + (batch_size or n), n)), start[part].to(device)
        with autocast(device, precision), progress_bar(sampler.steps, progress, desc="inpainting") as bar:
            z = integrate(
                rows_of(denoise, part), replacing, first, noise, rows, trajectory, which, partial(bar.update, 1)
            )
        done.append(z.float().cpu())
    return torch.where(mask, torch.cat(done), x.cpu()) if done else x.cpu()


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
    step, rows = DDIM(), cond.to(device) if cond is not None else None
    settled: Any = _Plain(denoise, rows)
    z = x.to(device)
    first = times[0]
    # from the data to the first time: what the network believes of the noise there, found by repetition
    eps = torch.zeros_like(z)
    for _ in range(FIRST):
        eps = settled(process.add_noise(z, eps, first).to(z), first).eps
    state = process.add_noise(z, eps, first).to(z)
    for t, s in pairwise(times):
        state, _ = step.step(settled, state, t, s, None, ImageNoise([]))
    return state.float().cpu()


FIRST = 3  # repetitions that find the noise of the first time


class _Plain:
    """A denoiser whose condition is settled."""

    def __init__(self, denoise: Denoise, cond: Condition | None):
        self.denoise, self.cond, self.process = denoise, cond, denoise.process

    def __call__(self, z: Tensor, t: Tensor) -> Any:
        return self.denoise(z, t, self.cond)


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
