"""The one loop from noise to images: `sample`.

Image i depends on seed i and condition i alone, whatever the batch size, the order or the number of devices: the
initial noise and all later noise are functions of the image's own seed (`diffzoo.rng.ImageNoise`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import Estimate, GaussianProcess
from diffzoo.progress import Bar, progress_bar
from diffzoo.rng import ImageNoise
from diffzoo.sampling.denoiser import Denoise, compile_networks, rows_of
from diffzoo.sampling.samplers import Noise, Steps
from diffzoo.typing import Condition, Data, Latents, Time, Times

__all__ = ["Moment", "Precision", "SampleOptions", "Settled", "autocast", "initial_noise_scale", "integrate", "sample"]

Precision = Literal["bf16", "fp16"]
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


# the bar moves with every step, so the count of images is a fraction until a batch is done
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"


class Moment(NamedTuple):
    """A step as a trajectory callback sees it.

    step:  number of the step, from 0; -1 on the last call, where x_hat is the finished image.
    t:     the time at which the step began.
    z:     the state at `t`, `(b, c, h, w)`.
    x_hat: the denoiser's estimate there, `(b, c, h, w)`; that of the first call where a step makes several.
    rows:  which images of the run these are.
    steps: of the walk.
    """

    step: int
    t: float
    z: Tensor
    x_hat: Tensor
    rows: range
    steps: int


class Settled:
    """A denoiser with its condition and clipping settled, which remembers the first estimate of each step."""

    def __init__(self, denoise: Denoise, cond: Condition | None, clip: float | None = None):
        self.process: GaussianProcess = denoise.process
        self.first: Tensor | None = None
        self._denoise, self._cond, self._clip = denoise, cond, clip

    def __call__(self, z: Data, t: Times) -> Estimate:
        estimate, score = self.parts(z, t)
        return estimate if score is None else self.process.add_score(estimate, z, t, score)

    def parts(self, z: Data, t: Times) -> tuple[Estimate, Data | None]:
        """The clipped estimate, and what a guidance that has `parts` adds to the score (classifier guidance)."""
        # it acts after clipping: clamping its result would undo a part of it
        split = getattr(self._denoise, "parts", None)
        estimate, score = split(z, t, self._cond) if split else (self._denoise(z, t, self._cond), None)
        if self._clip is not None:
            estimate = self.process.clip(estimate, z, t, self._clip)
        if self.first is None:
            self.first = estimate.x
        return estimate, score


def initial_noise_scale(process: GaussianProcess, t: Time) -> float:
    """Standard deviation of z at time `t` for data of unit variance: 1 on the variance-preserving path."""
    alpha, sigma = process.coefficients(t)
    return float((alpha.square() + sigma.square()).sqrt())


def walk(sampler: Steps, process: GaussianProcess) -> tuple[Time, ...]:
    """The times of a sampler, the same objects for each batch, so that what belongs to them is computed once."""
    try:
        return _walk(sampler, process)  # type: ignore[arg-type]
    except TypeError:  # a sampler or a process that has no hash, such as one with a list in it
        return sampler.times(process).unbind()


@lru_cache(maxsize=16)
def _walk(sampler: Steps, process: GaussianProcess) -> tuple[Time, ...]:
    return sampler.times(process).unbind()


@torch.no_grad()
def integrate(
    denoise: Denoise,
    sampler: Steps,
    z: Data,
    noise: Noise,
    cond: Condition | None = None,
    trajectory: Callable[[Moment], object] | None = None,
    rows: range | None = None,
    tick: Callable[[], object] | None = None,
) -> Data:
    """Walk one batch from `z` at the start of the sampler's grid to its end, in the dtype of `z`.

    Args:
        denoise: a denoiser, guided or not.
        sampler: how to step, and where.
        z: the state at the start, `(b, c, h, w)`.
        noise: where a stochastic sampler draws from.
        cond: conditions of the b images.
        trajectory: called with a `Moment` at each step.
        rows: which images of a larger run these are, for `trajectory`.
        tick: called after each step.
    """
    settled = Settled(denoise, cond, sampler.clip)
    times = walk(sampler, denoise.process)
    last = len(times) - 2
    memory: object = None
    rows = rows or range(len(z))
    for i, (t, s) in enumerate(pairwise(times)):
        settled.first = None
        before = z
        if i == last and sampler.final == "x_hat":
            z = sampler.finish(settled, z, t, noise)
        else:
            z, memory = sampler.step(settled, z, t, s, memory, noise)
        if trajectory is not None and settled.first is not None:
            trajectory(Moment(i, float(t), before, settled.first, rows, last + 1))
        if tick is not None:
            tick()
    if sampler.final == "denoise":
        z = sampler.finish(settled, z, times[-1], noise)
    if trajectory is not None:
        trajectory(Moment(-1, float(times[-1]), z, z, rows, last + 1))
    return z


class SampleOptions(TypedDict, total=False):
    """Keyword options of `sample`, for functions that pass them on."""

    device: torch.device | str
    batch_size: int | None
    progress: bool | None
    precision: Precision | None
    start: Latents | None
    trajectory: Callable[[Moment], object] | None
    compile: bool


def sample(
    denoise: Denoise,
    sampler: Steps,
    shape: Sequence[int],
    seeds: Sequence[int],
    cond: Condition | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    progress: bool | None = False,
    precision: Precision | None = None,
    start: Tensor | None = None,
    trajectory: Callable[[Moment], object] | None = None,
    compile: bool = False,
) -> Tensor:
    """Sample one image per seed.

    The network should be in evaluation mode, on `device`.

    Args:
        denoise: a denoiser, guided or not.
        sampler: how to step, and where.
        shape: of one image, `(c, h, w)`.
        seeds: one non-negative integer per image.
        cond: what to sample, one row per image; None for unconditional networks.
        device: where to compute.
        batch_size: images at a time; default all at once. When the device runs out of memory the batch is halved and
            sampling goes on, with the same images.
        progress: show a progress bar; None = in notebooks alone.
        precision: autocast the network to "bf16" or "fp16"; the sampler itself always computes in float32.
        start: the state at the start of the grid, `(n, c, h, w)`, instead of noise drawn from the seeds.
        trajectory: called with a `Moment` at each step of each batch; `Trajectory` collects them.
        compile: compile the networks first, for good; the first batch of each size then takes a minute or so longer.

    Returns:
        Images or latents `(n, c, h, w)`, float32, on the CPU.

    Raises:
        UserError: for conditions or a start that do not fit the seeds, or when one image alone does not fit in memory.
    """
    n = len(seeds)
    shape = tuple(int(d) for d in shape)
    _check(seeds, shape, cond, start, batch_size, precision)
    if compile:
        compile_networks(denoise)
    out = torch.empty(n, *shape)
    size = batch_size or max(n, 1)
    begin = 0
    with progress_bar(n, progress, desc="sampling", bar_format=_BAR) as bar:
        while begin < n:
            rows = range(begin, min(begin + size, n))
            images = _attempt(denoise, sampler, shape, seeds, cond, device, precision, start, trajectory, rows, bar)
            if images is None:
                if len(rows) == 1:
                    raise UserError(
                        "out of memory with a single image: use a smaller model, precision 'bf16' or another device"
                    )
                size = (len(rows) + 1) // 2
                continue
            out[begin : rows.stop] = images
            begin = rows.stop
    return out


def _attempt(
    denoise: Denoise,
    sampler: Steps,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    cond: Condition | None,
    device: torch.device | str,
    precision: Precision | None,
    start: Tensor | None,
    trajectory: Callable[[Moment], object] | None,
    rows: range,
    bar: Bar,
) -> Tensor | None:
    """One batch, on the CPU; None if it does not fit into the device's memory."""
    part = slice(rows.start, rows.stop)
    times = walk(sampler, denoise.process)
    shown = bar.n
    try:
        noise = ImageNoise(seeds[part], device)
        z = noise.normal(shape) * initial_noise_scale(denoise.process, times[0])
        if start is not None:
            z = start[part].to(device, torch.float32)
        with autocast(device, precision):
            images = integrate(
                rows_of(denoise, part),
                rows_of(sampler, part),
                z,
                noise,
                cond[part].to(device) if cond is not None else None,
                trajectory,
                rows,
                lambda: bar.update(min(len(rows) / (len(times) - 1), rows.stop - bar.n)),  # rounding adds up
            )
        return images.float().cpu()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        bar.update(shown - bar.n)
    # outside the handler: there, the traceback would keep the tensors of the failed attempt alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it means out of memory; libraries below torch and other devices than CUDA have messages of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def autocast(device: torch.device | str, precision: Precision | None) -> AbstractContextManager[object]:
    """Networks in the block compute in this precision; None changes nothing."""
    if precision is None:
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(torch.device(device).type, dtype=dtype)


def _check(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    cond: Condition | None,
    start: Tensor | None,
    batch_size: int | None,
    precision: str | None,
) -> None:
    n = len(seeds)
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise UserError("seeds must be integers from 0 to 2**63 - 1")
    if len(shape) != 3:
        raise UserError(f"expected the shape of one image, (c, h, w), got {shape}")
    if cond is not None and len(cond) != n:
        raise UserError(f"expected one condition per seed, got {len(cond)} conditions for {n} seeds")
    if start is not None and tuple(start.shape) != (n, *shape):
        raise UserError(f"expected a start of shape {(n, *shape)}, got {tuple(start.shape)}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if precision not in (None, "bf16", "fp16"):
        raise UserError(f"expected precision 'bf16', 'fp16' or none, got {precision!r}")
