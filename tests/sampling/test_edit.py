"""Sampling that begins with an image, against closed forms: a Gaussian whose flow is known, and its conditionals."""

import pytest
import torch
from oracles import GaussianOracle
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process import Cosine, DiscreteBetas, Estimate, GaussianProcess, LinearTime, Straight
from diffzoo.process.gaussian import expand_like
from diffzoo.sampling import DDIM, Ancestral, Heun, RespacedDDIM, sample
from diffzoo.sampling.edit import inpaint, interpolate, invert, noised, seed_noise, shortened
from diffzoo.typing import Condition

PROCESS = GaussianProcess(Cosine())


def data(n: int = 4, seed: int = 0) -> Tensor:
    return 0.7 + 0.4 * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_a_strength_is_a_share_of_the_sampler_s_own_steps() -> None:
    sampler = DDIM(steps=10)
    times = sampler.times(PROCESS)
    assert torch.equal(shortened(sampler, PROCESS, 0.3).times(PROCESS), times[7:])
    assert torch.equal(shortened(sampler, PROCESS, 1.0).times(PROCESS), times)
    assert shortened(sampler, PROCESS, 0.01).steps == 1
    chain = GaussianProcess(DiscreteBetas("linear"))
    assert torch.equal(shortened(RespacedDDIM(10), chain, 0.5).times(chain), RespacedDDIM(10).times(chain)[5:])
    for wrong in (0.0, 1.2, -1.0):
        with pytest.raises(UserError, match=r"expected a strength in \(0, 1\]"):
            shortened(sampler, PROCESS, wrong)


def test_little_strength_keeps_an_image_and_all_of_it_forgets_it() -> None:
    x, seeds = data(), range(4)
    oracle = GaussianOracle(PROCESS)
    moved = []
    for strength in (0.1, 0.5, 1.0):
        short = shortened(DDIM(steps=50), PROCESS, strength)
        out = sample(oracle, short, (1, 4, 4), seeds, start=noised(PROCESS, short, x, seeds))
        moved.append(float((out - x).square().mean().sqrt()))
    assert moved[0] < 0.2 < moved[1] < moved[2]
    fresh = sample(oracle, DDIM(steps=50), (1, 4, 4), seeds)
    whole = DDIM(steps=50)
    again = sample(oracle, whole, (1, 4, 4), seeds, start=noised(PROCESS, whole, x, seeds))
    torch.testing.assert_close(again, fresh, atol=0.02, rtol=0)  # at t = 1 hardly anything of x is left


@pytest.mark.parametrize("process", [PROCESS, GaussianProcess(LinearTime(), Straight())], ids=["cosine", "flow"])
@pytest.mark.parametrize("final", ["x_hat", "state"])
def test_inversion_comes_back_more_closely_with_more_steps(process: GaussianProcess, final: str) -> None:
    x, oracle = data(), GaussianOracle(process)
    errors = []
    for steps in (20, 80):
        sampler = DDIM(steps=steps, final=final)
        start = invert(oracle, sampler, x)
        errors.append(float((sample(oracle, sampler, (1, 4, 4), range(4), start=start) - x).abs().max()))
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.07


def test_inversion_finds_the_start_that_the_flow_has() -> None:
    x, oracle = data(), GaussianOracle(PROCESS)
    start = invert(oracle, DDIM(steps=400, final="state"), x)
    torch.testing.assert_close(start, oracle.solution(x, 0.0, 1.0).float(), atol=0.02, rtol=0)


class Correlated:
    """The exact denoiser of two pixels N(0, [[1, r], [r, 1]])."""

    def __init__(self, process: GaussianProcess, r: float):
        self.process = process
        self.covariance = torch.tensor([[1.0, r], [r, 1.0]], dtype=torch.float64)

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        alpha, sigma = (float(c) for c in self.process.coefficients(t))
        of_z = alpha**2 * self.covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        flat = z.flatten(1).double()
        x = (flat @ torch.linalg.solve(of_z, alpha * self.covariance)).reshape(z.shape)
        return Estimate(x.to(z), ((z - expand_like(torch.tensor(alpha), z) * x) / max(sigma, 1e-9)).to(z))

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return cond


def test_inpainting_samples_the_conditional_law_and_resampling_brings_it_nearer() -> None:
    r, n = 0.9, 400
    oracle = Correlated(PROCESS, r)
    x = torch.zeros(n, 1, 1, 2)
    x[..., 1] = 1.5  # known
    mask = torch.tensor([[True, False]])
    found = {}
    for resample in (1, 8):
        out = inpaint(oracle, Ancestral(steps=30, gamma=0.0), x, mask, range(n), resample=resample, batch_size=150)
        assert torch.equal(out[..., 1], x[..., 1])
        found[resample] = float(out[..., 0].mean()), float(out[..., 0].std())
    # the law given the known pixel is N(1.35, 0.44); plain replacement falls short of its mean
    assert abs(found[8][0] - r * 1.5) < 0.08
    assert abs(found[8][0] - r * 1.5) < abs(found[1][0] - r * 1.5)
    assert abs(found[8][1] - (1 - r**2) ** 0.5) < 0.1


def test_what_is_inpainted_depends_on_its_own_seed_alone() -> None:
    oracle, mask = GaussianOracle(PROCESS), torch.zeros(4, 4)
    mask[:2] = 1
    x = data(5)
    options = {"resample": 2}
    whole = inpaint(oracle, Heun(steps=5), x, mask, range(5), **options)
    parts = inpaint(oracle, Heun(steps=5), x, mask, range(5), batch_size=2, **options)
    torch.testing.assert_close(whole, parts)
    assert torch.equal(whole[:, :, 2:], x[:, :, 2:])
    with pytest.raises(UserError, match="a mask of their size"):
        inpaint(oracle, Heun(steps=5), x, torch.ones(3, 3), range(5))


def test_interpolation_keeps_the_norm_of_noise_and_its_ends() -> None:
    a, b = seed_noise(PROCESS, DDIM(), [3, 8], (3, 64, 64))
    between = interpolate(a, b, [0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[3], b)
    norms = between.flatten(1).norm(dim=1)
    assert float((norms / norms[0] - 1).abs().max()) < 0.05
    assert float(((a + b) / 2).norm() / a.norm()) < 0.8  # a straight line would
    torch.testing.assert_close(interpolate(a, a, [0.5])[0], a)
