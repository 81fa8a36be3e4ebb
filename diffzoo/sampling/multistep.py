"""Multistep exponential integrators: one network call per step, and the estimates of the steps before it.

`exponential.py` has the two forms and the integrals. The first steps have a lower order, since there is nothing to
remember yet; by default so have the last ones of a short run.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffzoo.errors import UserError, check_choice
from diffzoo.sampling.exponential import (
    Call,
    Form,
    Frame,
    Order,
    call,
    first_order,
    frame,
    interpolated,
    p1,
    slope,
    step_weights,
)
from diffzoo.sampling.grids import Grid, UniformLogSNR
from diffzoo.sampling.samplers import Denoised, Noise, Sampler
from diffzoo.typing import Data, Time

__all__ = ["DEIS", "DPMSolverMultistep", "Multistep", "UniPC"]

FEW_STEPS = 15


class _Past(NamedTuple):
    """The past of a run: the number of steps so far, and their calls, newest first.

    `state` is the state at the newest call, corrected.
    """

    steps: int = 0
    calls: tuple[Call, ...] = ()
    state: Tensor | None = None


@dataclass(frozen=True)
class Multistep(Sampler):
    """The base of multistep samplers.

    Args:
        order: how many estimates a step uses: 1, 2 or 3. Order 3 pays from about 20 steps on; with fewer, and on grids
            whose last steps are long in log-SNR, order 2 is safer.
        lower_order_final: with fewer than 15 steps, let the order fall to 1 at the end (2 in the last step but one).
            Most grids take their longest steps near the data, where a polynomial through the past says little.
        euler_at_final: make the last step one of first order, whatever the number of steps.
    """

    grid: Grid = field(default_factory=UniformLogSNR)
    order: Order = 2
    lower_order_final: bool = field(default=True, kw_only=True)
    euler_at_final: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, Order)

    def order_at(self, step: int) -> int:
        """The order of a step, counted from 0, if as many estimates are there."""
        left = self.steps - step
        if left == 1 and self.euler_at_final:
            return 1
        return min(self.order, left) if self.lower_order_final and self.steps < FEW_STEPS else self.order


@dataclass(frozen=True)
class DPMSolverMultistep(Multistep):
    """DPM-Solver++(2M) and (3M), their noise form, and their SDE variants.

    Order 2 weighs the derivative by `p1 / 2` (arXiv:2211.01095, Algorithm 2). Order 3 integrates the parabola exactly;
    public code takes half of its second derivative, which converges with order 2 only.

    Args:
        form: estimate data (DPM-Solver++) or noise (DPM-Solver).
        eta: 0 for the ODE; 1 for the reverse SDE, SDE-DPM-Solver++(2M) and (3M); between, `eta` times its noise. Data
            form. The law of the images converges with order 2 at most.
    """

    form: Form = "data"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, Form)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie in [0, 1], got {self.eta}")
        if self.eta and self.form == "noise":
            raise UserError("the SDE variant of DPM-Solver needs form 'data'")

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, _Past]:
        past = memory if isinstance(memory, _Past) else _Past()
        calls = (call(denoise, z, t, self.form), *past.calls)[: self.order]
        used, end = calls[: self.order_at(past.steps)], frame(denoise.process, s, self.form)
        z = self._sde_step(z, used, end, noise) if self.eta else multi_step(z, used, end)
        return z, _Past(past.steps + 1, calls)

    def _sde_step(self, z: Data, calls: tuple[Call, ...], b: Frame, noise: Noise) -> Data:
        """z decays by a further exp(-eta^2 h) and noise makes up for the variance (arXiv:2211.01095, appendix)."""
        a, h = calls[0], b.u - calls[0].at.u
        extra = self.eta**2 * h
        if len(calls) == 3:
            mean = interpolated(z, calls, b, a, 1 + self.eta**2)
        else:
            estimate = a.estimate if len(calls) == 1 else a.estimate + h / 2 * slope(calls[1], a)
            mean = b.rest / a.at.rest * torch.exp(-extra) * z - b.signal * p1(h + extra) * estimate
        return mean + b.rest * (-p1(2 * extra)).sqrt() * noise.normal(z.shape[1:]).to(z)


def multi_step(z: Data, calls: tuple[Call, ...], b: Frame) -> Data:
    """From the newest call to `b`; `calls` are newest first. DPM-Solver(++)'s step, and UniPC's predictor."""
    a = calls[0]
    if len(calls) == 3:
        return interpolated(z, calls, b, a)
    base = first_order(z, a, b)
    return base if len(calls) == 1 else base - step_weights(a.at, b)[2] * slope(calls[1], a)


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS in log-SNR (arXiv:2204.13902, tAB): the polynomial through the noise estimates, integrated exactly.

    Orders 1, 2 and 3 use as many estimates. Order 1 is DDIM; order 3 is `DPMSolverMultistep` of order 3 in noise form.
    """

    order: Order = 3

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, _Past]:
        past = memory if isinstance(memory, _Past) else _Past()
        calls = (call(denoise, z, t, "noise"), *past.calls)[: self.order]
        used = calls[: self.order_at(past.steps)]
        return interpolated(z, used, frame(denoise.process, s, "noise"), used[0]), _Past(past.steps + 1, calls)


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC (arXiv:2302.04867, Algorithms 1 and 2, B2): a multistep predictor, and a corrector that costs no call.

    The call at the predicted state serves twice: it corrects the step that led there, then predicts the next. With p
    estimates the order is p + 1; public names count p.

    Args:
        form: estimate data, as the paper advises for guided sampling, or noise.
    """

    form: Form = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, Form)

    def step(self, denoise: Denoised, z: Data, t: Time, s: Time, memory: object, noise: Noise) -> tuple[Data, _Past]:
        past = memory if isinstance(memory, _Past) else _Past()
        here = call(denoise, z, t, self.form)
        if past.state is not None:
            z = _corrected(past.state, past.calls[: self.order_at(past.steps - 1)], here)
        calls = (here, *past.calls)[: self.order]
        used = calls[: self.order_at(past.steps)]
        return multi_step(z, used, frame(denoise.process, s, self.form)), _Past(past.steps + 1, calls, z)


def _corrected(z: Data, calls: tuple[Call, ...], end: Call) -> Data:
    """The step from `calls[0]`, where the state is z, to `end`, made again with the estimate at `end`."""
    a = calls[0]
    if len(calls) > 1:
        return interpolated(z, (end, *calls), end.at, a)
    # two estimates weigh the same here, as in the paper's code, instead of as the line through them would have it
    h = end.at.u - a.at.u
    return first_order(z, a, end.at) - end.at.signal * p1(h) / 2 * (end.estimate - a.estimate)
