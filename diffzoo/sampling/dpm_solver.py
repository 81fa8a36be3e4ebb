"""DPM-Solver and DPM-Solver++, singlestep: several network calls from one grid point to the next, none remembered.

`exponential.py` has the two forms; every formula below is written for the data form. With h the step in u,

    (1)  p1 = exp(-h) - 1,   p2 = p1 / h + 1

are the integrals of the polynomial's terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError, check_choice
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.sampling.exponential import Call, Form, Frame, Order, call, first_order, frame, p1, slope
from diffzoo.sampling.grids import Grid, UniformTime
from diffzoo.sampling.samplers import Denoised, Final, Noise, Sampler
from diffzoo.typing import Data, Time, Times

__all__ = ["DPMSolver"]

Method = Literal["fast", "singlestep"]
Inner = Literal["grid", "logsnr"]


class _Group(NamedTuple):
    """A singlestep group under way: its number, the state at its start, and the calls made so far."""

    number: int
    z: Tensor | None = None
    calls: tuple[Call, ...] = ()


def _single_step(z: Data, calls: tuple[Call, ...], b: Frame, last: bool) -> Data:
    """From the start of a group to `b`, after one to three calls in it.

    `last` tells the end of the group from an inner node. The first inner node is reached with first order, the second
    with one derivative; the end takes its derivative from the newest call (arXiv:2206.00927, Algorithms 1 and 2;
    arXiv:2211.01095, Algorithm 1).
    """
    h = b.u - calls[0].at.u
    base = first_order(z, calls[0], b)
    if len(calls) == 1:
        return base
    gradient = slope(calls[0], calls[-1])
    if last and len(calls) == 2:
        return base - b.signal * (p1(h) * h / 2) * gradient
    return base + b.signal * ((p1(h) / h + 1) * h) * gradient


def _divided(process: GaussianProcess, outer: Float[Tensor, " m"], parts: Sequence[int]) -> Float[Tensor, " n"]:
    """The times with each interval divided evenly in log-SNR, into as many parts as stated for it."""
    logsnr = process.logsnr(outer)
    times = [outer[:1]]
    for i, k in enumerate(parts):
        inside = logsnr[i] + (logsnr[i + 1] - logsnr[i]) * torch.arange(1, k, dtype=torch.float64) / k
        times += [process.schedule.time(inside), outer[i + 1 : i + 2]]
    return torch.cat(times)


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """Singlestep DPM-Solver, as U-ViT and DiMR use it; with data form and order 2 it is DPM-Solver++(2S).

    The steps between grid points are taken in groups; a group of k makes k network calls, one per step, and advances
    with order k. Each call of `step` is one network call, so `steps` is the cost.

    Args:
        steps: network calls.
        order: 1, 2 or 3; the size of the largest group.
        form: estimate data ("data", DPM-Solver++) or noise ("noise", DPM-Solver).
        method: "fast" spends exactly `steps` calls on groups of 3, the last two or one smaller; needs order 3.
            "singlestep" makes `steps // order` groups of `order`.
        inner: where the calls inside a group happen. "grid": the grid has `steps + 1` points and a group takes
            the next ones (U-ViT and DiMR on latents). "logsnr": the grid has one point per group, and each group is
            divided evenly in log-SNR (U-ViT in pixel space; "singlestep" in both).
        final: "state" by default, as in the public code, whose grids end at t_end = 1e-3 or 1e-4.
    """

    grid: Grid = field(default_factory=lambda: UniformTime(t_end=1e-3))
    final: Final = "state"
    order: Order = 3
    form: Form = "data"
    method: Method = "fast"
    inner: Inner = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, Form)
        check_choice("order", self.order, Order)
        check_choice("method", self.method, Method)
        check_choice("inner", self.inner, Inner)
        if self.method == "fast" and self.order != 3:
            raise UserError(f"method 'fast' is of order 3, got order {self.order}: use method 'singlestep'")
        if self.method == "singlestep" and self.steps < self.order:
            raise UserError(f"order {self.order} needs at least {self.order} steps, got {self.steps}")

    @property
    def orders(self) -> list[int]:
        """The size of each group."""
        if self.method == "singlestep":
            return [self.order] * (self.steps // self.order)
        groups, rest = divmod(self.steps, 3)
        return [3] * (groups - 1) + [2, 1] if rest == 0 else [3] * groups + [rest]

    @property
    def calls(self) -> int:
        return sum(self.orders) + (self.final == "denoise")

    def times(self, process: GaussianProcess) -> Times:
        if self.inner == "grid":
            return self.grid.times(process, sum(self.orders))
        return _divided(process, self.grid.times(process, len(self.orders)), self.orders)

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, _Group]:
        group = memory if isinstance(memory, _Group) else _Group(0)
        start = z if group.z is None else group.z
        calls = (*group.calls, call(denoise, z, t, self.form))
        last = len(calls) == self.orders[group.number]
        z = _single_step(start, calls, frame(denoise.process, s, self.form), last)
        return z, _Group(group.number + 1) if last else _Group(group.number, start, calls)
