"""Exponential integrators of the probability-flow ODE: what DPM-Solver, DEIS and UniPC share.

With the half log-SNR `u = log(alpha / sigma)` as time, the ODE has the two exact solutions

    (1)  z_s / sigma_s = z_t / sigma_t + integral of e^u x_hat du        data form, DPM-Solver++ (arXiv:2211.01095)
    (2)  z_s / alpha_s = z_t / alpha_t - integral of e^-u eps_hat du     noise form, DPM-Solver (arXiv:2206.00927)

of which only the integral is approximated, by a polynomial in u. (2) is (1) with alpha and sigma exchanged, u negated
and eps_hat in place of x_hat, so one implementation serves both: `Frame` holds the quantities of either form, and every
formula is written for the data form.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.process.gaussian import GaussianProcess
from diffzoo.process.table import tabulated
from diffzoo.sampling.samplers import Denoised, node
from diffzoo.typing import Data, Time

__all__ = [
    "Call",
    "Form",
    "Frame",
    "Order",
    "call",
    "first_order",
    "frame",
    "interpolated",
    "p1",
    "slope",
    "step_weights",
    "weights",
]

Form = Literal["data", "noise"]
Order = Literal[1, 2, 3]


class Frame(NamedTuple):
    """A node as a form sees it: the time u and the coefficients of what is estimated and of the rest, each `()`."""

    u: Time
    signal: Time
    rest: Time


class Call(NamedTuple):
    """A network call: where, and the estimate that the form uses, `(b, c, h, w)`."""

    at: Frame
    estimate: Data


@tabulated
def frame(process: GaussianProcess, t: Time, form: Form) -> Frame:
    """The process at time `t` in one of the two forms."""
    n = node(process, t)
    return Frame(n.logsnr / 2, n.alpha, n.sigma) if form == "data" else Frame(-n.logsnr / 2, n.sigma, n.alpha)


def call(denoise: Denoised, z: Data, t: Time, form: Form) -> Call:
    """Ask the network at `t`."""
    estimate = denoise(z, t)
    return Call(frame(denoise.process, t, form), estimate.x if form == "data" else estimate.eps)


def p1(h: Time) -> Time:
    """exp(-h) - 1: minus the weight of an estimate that is constant over a step of h in u."""
    return torch.expm1(-h)


def first_order(z: Data, a: Call, b: Frame) -> Data:
    """From `a` to `b` with the estimate of `a` held constant; this is DDIM."""
    of_z, of_estimate, _ = step_weights(a.at, b)
    return of_z * z - of_estimate * a.estimate


@tabulated
def step_weights(a: Frame, b: Frame) -> tuple[Time, Time, Time]:
    """For a step from `a` to `b`: what z is multiplied by, and an estimate and its derivative, with opposite signs."""
    h = b.u - a.u
    return b.rest / a.rest, b.signal * p1(h), b.signal * (p1(h) * h / 2)


def slope(a: Call, b: Call) -> Data:
    """The divided difference of two estimates."""
    return (b.estimate - a.estimate) / _distance(a.at, b.at)


@tabulated
def _distance(a: Frame, b: Frame) -> Time:
    return b.u - a.u


def weights(nodes: Float[Tensor, "k"], moments: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """The weights of the values at k nodes, `(k,)`, that integrate every polynomial of degree below k exactly.

    Args:
        nodes: where the values are, `(k,)`.
        moments: the integrals of 1, x, ..., x^(k-1), `(k,)`.
    """
    powers = torch.arange(len(nodes), dtype=nodes.dtype)
    return torch.linalg.solve(nodes[None] ** powers[:, None], moments)


def interpolated(z: Data, calls: tuple[Call, ...], b: Frame, start: Call, stretch: float = 1.0) -> Data:
    """From `start` to `b`, where z is the state at `start`, with the polynomial in u through the estimates of `calls`.

    The polynomial is integrated exactly: w = (u - u_start) / h, H = stretch h,

        H integral of w^k exp(-H (1 - w)) dw from 0 to 1 = I_k,   I_0 = 1 - exp(-H),  I_k = 1 - (k / H) I_(k-1).

    `stretch` is 1 for the ODE, and larger where a stochastic sampler lets z decay faster.
    """
    step = b.u - start.at.u
    h = stretch * step
    moments = [-p1(h)]
    for k in range(1, len(calls)):
        moments.append(1 - k / h * moments[-1])
    found = weights(torch.stack([(c.at.u - start.at.u) / step for c in calls]), torch.stack(moments))
    total = sum(w * c.estimate for w, c in zip(found, calls, strict=True))
    return b.rest / start.at.rest * torch.exp(step - h) * z + b.signal * total
