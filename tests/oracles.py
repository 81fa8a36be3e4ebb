"""Data whose diffusion is known in closed form, as denoisers: the test problems for samplers, guidance and metrics.

For data N(mean, std^2) the posterior mean is linear in z and the probability-flow ODE has the solution

    (1)  z(t) = alpha mean + sqrt(alpha^2 std^2 + sigma^2) xi,    xi constant along the path.

For a mixture of Gaussians the posterior mean is the responsibility-weighted mean of the components' ones; the ODE has
no closed form, but the law of its end is the mixture.
"""

import torch
from torch import Tensor

from diffzoo.process import Estimate, GaussianProcess, expand_like
from diffzoo.typing import Condition


class GaussianOracle:
    """The exact denoiser of independent pixels N(mean, std^2)."""

    def __init__(self, process: GaussianProcess, mean: float = 0.7, std: float = 0.4):
        self.process, self.mean, self.std = process, mean, std
        self.calls = 0
        self.images = 0

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        self.calls += 1
        self.images += len(z)
        alpha, sigma = (expand_like(c, z) for c in self.process.coefficients(t))
        variance = alpha**2 * self.std**2 + sigma**2
        # each from its own closed form: x from eps, or the other way round, would lose digits at one end
        x = (alpha * self.std**2 * z + sigma**2 * self.mean) / variance
        return Estimate(x, sigma * (z - alpha * self.mean) / variance)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return cond

    def solution(self, z: Tensor, t: float, s: float) -> Tensor:
        """(1): where the ODE carries z from time t to time s."""
        (a, b), (c, d) = (self.process.coefficients(torch.tensor(u, dtype=torch.float64)) for u in (t, s))
        xi = (z - a * self.mean) / (a**2 * self.std**2 + b**2).sqrt()
        return c * self.mean + (c**2 * self.std**2 + d**2).sqrt() * xi


class MixtureOracle:
    """The exact denoiser of a mixture of isotropic Gaussians over flattened images.

    Labels of a condition choose a component; the label K, the number of components, is the null class, the whole
    mixture.

    Args:
        process: schedule and path.
        weights: of the components, `(k,)`.
        means: `(k, d)`, d = c h w.
        stds: `(k,)`.
        table: which components a label stands for, bool `(labels, k)`; default one each, and all for the null class.
        null: the label of the null class; default the last.
    """

    def __init__(
        self,
        process: GaussianProcess,
        weights: Tensor,
        means: Tensor,
        stds: Tensor,
        table: Tensor | None = None,
        null: int | None = None,
    ):
        self.process = process
        self.weights, self.means, self.stds = weights.double(), means.double(), stds.double()
        k = len(weights)
        self.table = torch.cat([torch.eye(k), torch.ones(1, k)]).bool() if table is None else table
        self.null = len(self.table) - 1 if null is None else null
        self.calls = 0
        self.images = 0

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        self.calls += 1
        self.images += len(z)
        flat = z.flatten(1).double()
        alpha, sigma = (c.double().reshape(-1, 1) for c in self.process.coefficients(t.double()))
        variance = alpha**2 * self.stds**2 + sigma**2  # (1 or b, k)
        offset = flat[:, None] - alpha[:, :, None] * self.means  # (b, k, d)
        log_density = -offset.square().sum(2) / (2 * variance) - flat.shape[1] / 2 * variance.log()
        prior = self.weights.log().expand(len(z), -1)
        if cond is not None and cond.label is not None:
            prior = prior.masked_fill(~self.table[cond.label], -torch.inf)
        share = torch.softmax(log_density + prior, dim=1)
        x = self.means + (alpha * self.stds**2 / variance)[:, :, None] * offset
        eps = (sigma / variance)[:, :, None] * offset
        x, eps = ((share[:, :, None] * v).sum(1).reshape(z.shape).to(z.dtype) for v in (x, eps))
        return Estimate(x, eps)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        if cond is None or cond.label is None:
            return None
        return Condition(label=torch.full_like(cond.label, self.null))

    def component(self, x: Tensor) -> Tensor:
        """The most likely component of each image, `(n,)`."""
        flat = x.flatten(1).double()
        square = (flat[:, None] - self.means).square().sum(2)
        return (self.weights.log() - square / (2 * self.stds**2) - flat.shape[1] * self.stds.log()).argmax(1)


class Replay:
    """A noise source that gives out recorded draws, `(k, b, c, h, w)`, in order."""

    def __init__(self, draws: Tensor):
        self._draws = iter(draws)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return next(self._draws)
