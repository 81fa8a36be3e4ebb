"""DPM-Solver and DPM-Solver++: exponential integrators of the probability-flow ODE in log-SNR.

With the half log-SNR `u = log(alpha / sigma)` as time, the ODE has the two exact solutions

    (1)  z_s / sigma_s = z_t / sigma_t + integral of e^u x_hat du        data form, DPM-Solver++ (arXiv:2211.01095)
    (2)  z_s / alpha_s = z_t / alpha_t - integral of e^-u eps_hat du     noise form, DPM-Solver (arXiv:2206.00927)

of which only the integral is approximated, by a polynomial in u. (2) is (1) with alpha and sigma exchanged, u negated
and eps_hat in place of x_hat, so one implementation serves both: `_Frame` holds the quantities of either form, and
every formula below is written for the data form. With h the step in u,

    (3)  p1 = exp(-h) - 1,   p2 = p1 / h + 1,   p3 = p2 / h - 1/2

are the integrals of the polynomial's terms.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import GaussianProcess
from diffzoo.sampling.grids import Grid, UniformLogSNR, UniformTime
from diffzoo.sampling.samplers import Denoised, Final, Noise, Sampler, node

__all__ = ["DPMSolver", "DPMSolverMultistep", "Form"]

Form = Literal["data", "noise"]


class _Frame(NamedTuple):
    """A node as a form sees it: the time u and the coefficients of what is estimated and of the rest."""

    u: Tensor
    signal: Tensor
    rest: Tensor


class _Call(NamedTuple):
    """A network call: where, and the estimate that the form uses."""

    at: _Frame
    estimate: Tensor


def _frame(process: GaussianProcess, t: Tensor, form: Form) -> _Frame:
    n = node(process, t)
    return _Frame(n.logsnr / 2, n.alpha, n.sigma) if form == "data" else _Frame(-n.logsnr / 2, n.sigma, n.alpha)


def _call(denoise: Denoised, z: Tensor, t: Tensor, form: Form) -> _Call:
    estimate = denoise(z, t)
    return _Call(_frame(denoise.process, t, form), estimate.x if form == "data" else estimate.eps)


def _p1(h: Tensor) -> Tensor:
    return torch.expm1(-h)


def _p2(h: Tensor) -> Tensor:
    return _p1(h) / h + 1


def _p3(h: Tensor) -> Tensor:
    return _p2(h) / h - 0.5


def _first_order(z: Tensor, a: _Call, b: _Frame) -> Tensor:
    """From `a` to `b` with the estimate of `a` held constant; this is DDIM."""
    return b.rest / a.at.rest * z - b.signal * _p1(b.u - a.at.u) * a.estimate


class _Group(NamedTuple):
    """A singlestep group under way: its number, the state at its start, and the calls made so far."""

    number: int
    z: Tensor | None = None
    calls: tuple[_Call, ...] = ()


def _slope(a: _Call, b: _Call) -> Tensor:
    return (b.estimate - a.estimate) / (b.at.u - a.at.u)


def _single_step(z: Tensor, calls: tuple[_Call, ...], b: _Frame, last: bool) -> Tensor:
    """From the start of a group to `b`, after one to three calls in it.

    `last` tells the end of the group from an inner node. The first inner node is reached with first order, the second
    with one derivative; the end takes its derivative from the newest call (arXiv:2206.00927, Algorithms 1 and 2;
    arXiv:2211.01095, Algorithm 1).
    """
    h = b.u - calls[0].at.u
    base = _first_order(z, calls[0], b)
    if len(calls) == 1:
        return base
    slope = _slope(calls[0], calls[-1])
    if last and len(calls) == 2:
        return base - b.signal * (_p1(h) * h / 2) * slope
    return base + b.signal * (_p2(h) * h) * slope


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
    order: int = 3
    form: Form = "data"
    method: Literal["fast", "singlestep"] = "fast"
    inner: Literal["grid", "logsnr"] = "grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.order, self.form)
        if self.method not in ("fast", "singlestep"):
            raise UserError(f"expected method 'fast' or 'singlestep', got {self.method!r}")
        if self.inner not in ("grid", "logsnr"):
            raise UserError(f"expected inner 'grid' or 'logsnr', got {self.inner!r}")
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

    def times(self, process: GaussianProcess) -> Tensor:
        if self.inner == "grid":
            return self.grid.times(process, sum(self.orders))
        outer = self.grid.times(process, len(self.orders))
        logsnr = process.logsnr(outer)
        times = [outer[:1]]
        for i, k in enumerate(self.orders):
            inside = logsnr[i] + (logsnr[i + 1] - logsnr[i]) * torch.arange(1, k, dtype=torch.float64) / k
            times += [process.schedule.time(inside), outer[i + 1 : i + 2]]
        return torch.cat(times)

    def step(self, denoise: Denoised, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise) -> tuple[Tensor, Any]:
        group: _Group = memory or _Group(0)
        start = z if group.z is None else group.z
        calls = (*group.calls, _call(denoise, z, t, self.form))
        last = len(calls) == self.orders[group.number]
        z = _single_step(start, calls, _frame(denoise.process, s, self.form), last)
        return z, _Group(group.number + 1) if last else _Group(group.number, start, calls)


@dataclass(frozen=True)
class DPMSolverMultistep(Sampler):
    """DPM-Solver++(2M) and (3M), their noise form, and the SDE variant of (2M): one network call per step.

    The polynomial goes through the estimates of this and the steps before, so the first steps have a lower order. Order
    2 weighs the derivative by `p1 / 2` (arXiv:2211.01095, Algorithm 2). Order 3 integrates the parabola exactly; public
    code takes half of its second derivative, which converges with order 2 only.

    Args:
        order: 1, 2 or 3.
        form: estimate data (DPM-Solver++) or noise (DPM-Solver).
        eta: 0 for the ODE; 1 for the reverse SDE, SDE-DPM-Solver++(2M); between, `eta` times its noise. Data form,
            order at most 2.
    """

    grid: Grid = field(default_factory=UniformLogSNR)
    order: int = 2
    form: Form = "data"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.order, self.form)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie in [0, 1], got {self.eta}")
        if self.eta and (self.form == "noise" or self.order > 2):
            raise UserError("the SDE variant of DPM-Solver needs form 'data' and order 1 or 2")

    def step(self, denoise: Denoised, z: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise) -> tuple[Tensor, Any]:
        calls = (_call(denoise, z, t, self.form), *(memory or ()))[: self.order]
        end = _frame(denoise.process, s, self.form)
        if self.eta:
            return self._sde_step(z, calls, end, noise), calls
        return _multi_step(z, calls, end), calls

    def _sde_step(self, z: Tensor, calls: tuple[_Call, ...], b: _Frame, noise: Noise) -> Tensor:
        """z decays by a further exp(-eta^2 h) and noise makes up for the variance (arXiv:2211.01095, appendix)."""
        a, h = calls[0], b.u - calls[0].at.u
        extra = self.eta**2 * h
        estimate = a.estimate if len(calls) == 1 else a.estimate + h / 2 * _slope(calls[1], a)
        mean = b.rest / a.at.rest * torch.exp(-extra) * z - b.signal * _p1(h + extra) * estimate
        return mean + b.rest * (-_p1(2 * extra)).sqrt() * noise.normal(z.shape[1:]).to(z)


def _multi_step(z: Tensor, calls: tuple[_Call, ...], b: _Frame) -> Tensor:
    """From the newest call to `b`; `calls` are newest first."""
    a, h = calls[0], b.u - calls[0].at.u
    base = _first_order(z, a, b)
    if len(calls) == 1:
        return base
    slope = _slope(calls[1], a)
    if len(calls) == 2:
        return base - b.signal * (_p1(h) * h / 2) * slope
    bend = (slope - _slope(calls[2], calls[1])) / (a.at.u - calls[2].at.u)  # half the second derivative
    slope = slope + (a.at.u - calls[1].at.u) * bend
    return base + b.signal * (_p2(h) * h) * slope - 2 * b.signal * (_p3(h) * h**2) * bend


def _check(order: int, form: str) -> None:
    if order not in (1, 2, 3):
        raise UserError(f"DPM-Solver has orders 1, 2 and 3, got {order}")
    if form not in ("data", "noise"):
        raise UserError(f"expected form 'data' or 'noise', got {form!r}")
