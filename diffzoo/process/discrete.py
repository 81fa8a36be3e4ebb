"""Discrete chains: which steps are kept, the reverse step between two of them, the loss that learns its variance.

DDPM's chain (arXiv:2006.11239) with alpha_bar = alpha^2 on the variance-preserving path. From time t to an earlier
kept time s (alpha_bar_s = 1 where s is the data),

    (1)  beta = 1 - alpha_bar_t / alpha_bar_s
    (2)  q(z_s | z_t, x) = N(mean_x x + mean_z z_t, variance)
             mean_x   = beta sqrt(alpha_bar_s) / (1 - alpha_bar_t)
             mean_z   = (1 - alpha_bar_s) sqrt(1 - beta) / (1 - alpha_bar_t)
             variance = beta (1 - alpha_bar_s) / (1 - alpha_bar_t)
    (3)  log of the learned variance = f log beta + (1 - f) log variance,  f = (v + 1) / 2
    (4)  L = mse(out_hat, out) + KL(q || p) in bits per dimension at the same step

(3) and (4) are Eq. 15 and 16 of arXiv:2102.09672 in ADM's form: v, the network's second half, is not clamped, so f may
leave [0, 1]; the mean does not learn from the KL term; and the paper's lambda = 0.001 on a sum over 1000 steps is the
weight 1 on the term of one step. At the last step (2) has no variance, so its logarithm is that of the step before.

All tables are float64; coefficients reach float32 only where they meet an image.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import Estimate, GaussianProcess, expand_like
from diffzoo.process.schedules import DiscreteBetas

__all__ = [
    "ReverseMoments",
    "ReverseStep",
    "ReverseVariance",
    "discrete_schedule",
    "hybrid_loss",
    "kept_steps",
    "prior_bits",
    "reverse_moments",
    "reverse_step",
    "variational_bound",
]

ReverseVariance = Literal["learned", "fixed_large", "fixed_small"]


# -- respacing


def kept_steps(respacing: str | int | None, steps: int) -> tuple[int, ...]:
    """The indices out of 0..steps-1 that a shorter chain keeps, ascending.

    Args:
        respacing: "250": that many, spread over the whole range with both ends kept. "90,60,60,20,20": so
            many in each of equally long sections. "ddim25": the smallest whole stride that gives exactly so many, from
            index 0. None or "": all.
        steps: length of the full chain.

    Raises:
        UserError: for impossible counts; the message names possible ones.
    """
    if respacing is None or respacing == "":
        return tuple(range(steps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _strided(_count(respacing.removeprefix("ddim"), respacing), steps)
    return _sections([_count(part, respacing) for part in str(respacing).split(",")], steps)


def _count(part: str, respacing: object) -> int:
    try:
        count = int(part)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(
            f"cannot read the respacing {respacing!r}: expected a form like '250', '90,60,60,20,20' or 'ddim25'"
        )
    return count


def _strided(count: int, steps: int) -> tuple[int, ...]:
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return tuple(range(0, steps, stride))
    possible = sorted({len(range(0, steps, stride)) for stride in range(1, steps + 1)})
    below, above = [c for c in possible if c < count], [c for c in possible if c > count]
    near = " or ".join(f"'ddim{c}'" for c in (*below[-1:], *above[:1]))
    uneven = f", or '{count}' for steps of unequal length" if count < steps else ""
    raise UserError(f"no whole stride gives {count} of {steps} steps: use {near}{uneven}")


def _sections(counts: list[int], steps: int) -> tuple[int, ...]:
    size, longer = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise UserError(
                f"cannot keep {count} of {length} steps: {steps} steps make {len(counts)} sections of {size} or more, "
                f"so each count can be {size} at most, got {','.join(map(str, counts))}"
            )
        stride, position = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # accumulated and rounded half to even, as the published numbers were
            kept.append(start + round(position))
            position += stride
        start += length
    return tuple(sorted(set(kept)))


def discrete_schedule(process: GaussianProcess) -> DiscreteBetas:
    """The table of betas of a process.

    Raises:
        UserError: if its schedule is continuous.
    """
    if not isinstance(process.schedule, DiscreteBetas):
        raise UserError(
            f"expected a process with a table of steps (DiscreteBetas), got {type(process.schedule).__name__}: "
            "use a sampler for continuous time"
        )
    return process.schedule


# -- the reverse step


class ReverseStep(NamedTuple):
    """(1) and (2) for steps from t to s, as float64 tensors of one shape.

    mean_x, mean_z: coefficients of the mean.
    variance:       of (2); 0 where s is the data.
    log_variance:   its logarithm, at the last step that of the step before.
    log_beta:       logarithm of (1), the upper bound of the variance.
    """

    mean_x: Tensor
    mean_z: Tensor
    variance: Tensor
    log_variance: Tensor
    log_beta: Tensor


def reverse_step(log_alpha_t: Tensor, log_alpha_s: Tensor, log_variance: Tensor | None = None) -> ReverseStep:
    """(1) and (2).

    Args:
        log_alpha_t, log_alpha_s: log alpha at both times, float64; 0 at the data.
        log_variance: what to use for the logarithm of the variance where s is the data; default log beta.
    """
    beta = -torch.expm1(2 * (log_alpha_t - log_alpha_s))
    noise_t, noise_s = -torch.expm1(2 * log_alpha_t), -torch.expm1(2 * log_alpha_s)
    variance = beta * noise_s / noise_t
    log_beta = beta.log()
    instead = log_beta if log_variance is None else log_variance.to(log_beta)
    return ReverseStep(
        mean_x=beta * log_alpha_s.exp() / noise_t,
        mean_z=noise_s * (log_alpha_t - log_alpha_s).exp() / noise_t,
        variance=variance,
        log_variance=torch.where(noise_s > 0, variance.log(), instead),
        log_beta=log_beta,
    )


class ReverseMoments(NamedTuple):
    """Mean, variance and log variance of the model's p(z_s | z_t), each of the shape of z or broadcasting to it."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def reverse_moments(step: ReverseStep, estimate: Estimate, z: Tensor, variance: ReverseVariance) -> ReverseMoments:
    """The model's reverse step: (2) with x_hat for x, and one of three variances.

    Args:
        step: coefficients, `()` or `(b,)`.
        estimate: of the network at t, clipped or not.
        z: the state at t, `(b, c, h, w)`.
        variance: "learned" is (3); "fixed_large" is beta, "fixed_small" that of (2), the two choices of DDPM.
    """
    mean = expand_like(step.mean_x, z) * estimate.x + expand_like(step.mean_z, z) * z
    if variance == "fixed_small":
        return ReverseMoments(mean, expand_like(step.variance, z), expand_like(step.log_variance, z))
    if variance == "fixed_large":
        log_variance = expand_like(torch.where(step.variance > 0, step.log_beta, step.log_variance), z)
    else:
        if estimate.variance is None:
            raise UserError("this model has no learned variance: choose variance 'fixed_large' or 'fixed_small'")
        share = (estimate.variance + 1) / 2
        log_variance = share * expand_like(step.log_beta, z) + (1 - share) * expand_like(step.log_variance, z)
    return ReverseMoments(mean, log_variance.exp(), log_variance)


# -- the loss


def hybrid_loss(
    process: GaussianProcess, output: Tensor, x: Tensor, z: Tensor, eps: Tensor, t: Tensor, bound_weight: float = 1.0
) -> Tensor:
    """(4) per sample, `(b,)`: the loss of a network with learned variance.

    Args:
        process: with a table of steps and `learned_variance`.
        output: what the network said of z, `(b, 2c, h, w)`.
        x, z, eps: clean data, the diffused data that the network saw, and the noise between them, `(b, c, h, w)`.
        t: times, `(b,)`; any that is no step of the table is followed by a step of the same length. Times before the
            first step count as the first.
        bound_weight: factor on the second term of (4); 1 in all published models (N / 1000 in ADM's "rescaled" loss).
    """
    mean, variance = output.chunk(2, dim=1)
    error = (mean - process.target(x, eps, t)).square().flatten(1).mean(1)
    return error + bound_weight * variational_bound(process, torch.cat([mean.detach(), variance], dim=1), x, z, t)


def variational_bound(
    process: GaussianProcess, output: Tensor, x: Tensor, z: Tensor, t: Tensor, variance: ReverseVariance = "learned"
) -> Tensor:
    """The term of the bound that belongs to time t, bits per dimension, `(b,)`.

    KL(q || p) between (2) and the model; at the last step the negative log-likelihood of images of 256 levels in
    [-1, 1]. x_hat is not clipped here.

    Args:
        process, output, x, z, t: as in `hybrid_loss`; the output is `(b, c, h, w)` for fixed variances.
        variance: the model's variance.
    """
    schedule = discrete_schedule(process)
    t = _on_grid(t.double(), schedule.steps).clamp_min(1 / schedule.steps)
    step = _training_step(schedule, t)
    model = reverse_moments(step, process.interpret(output, z, t), z, variance)
    truth = expand_like(step.mean_x, z) * x + expand_like(step.mean_z, z) * z
    divergence = _normal_kl(truth, expand_like(step.log_variance, z), model.mean, model.log_variance)
    likelihood = _log_likelihood(x, model.mean, 0.5 * model.log_variance)
    nats = torch.where(expand_like(step.variance, z) > 0, divergence, -likelihood)
    return nats.flatten(1).mean(1) / math.log(2)


def prior_bits(process: GaussianProcess, x: Tensor) -> Tensor:
    """KL(q(z_1 | x) || N(0, 1)): what the bound pays for stopping at t = 1, bits per dimension, `(b,)`."""
    log_alpha = discrete_schedule(process).log_alpha[-1]
    log_variance = torch.log(-torch.expm1(2 * log_alpha)).to(x)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return _normal_kl(log_alpha.exp().to(x) * x, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def _on_grid(t: Tensor, steps: int) -> Tensor:
    """Times that are a step up to rounding, exactly; others as they are."""
    nearest = (t * steps).round()
    return torch.where((t * steps - nearest).abs() < 1e-3, nearest / steps, t)


def _training_step(schedule: DiscreteBetas, t: Tensor) -> ReverseStep:
    """The reverse step from t to 1 / N before it."""
    n = schedule.steps

    def between(start: Tensor, last: Tensor | None) -> ReverseStep:
        end = _on_grid(start - 1 / n, n)
        return reverse_step(schedule.log_alpha_at(start), schedule.log_alpha_at(end), last)

    second = between(torch.full_like(t, 2 / n), None).log_variance
    step = between(t, second)
    # between the first two steps of the table the variance would fall to nothing
    return step._replace(log_variance=step.log_variance.maximum(second))


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL between two normal distributions, nats, element by element."""
    # the terms nearly cancel; recorded float32 losses need them in this order
    spread = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (-1 + log_variance2 - log_variance1 + spread + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the 256 levels under a normal distribution, nats; the outermost bins are open.

    The distribution function is the tanh approximation of the GELU, as in the code that the published bounds come from.
    """

    def cdf(edge: float) -> Tensor:
        u = (x - mean + edge) * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    upper, lower = cdf(1 / 255), cdf(-1 / 255)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()
