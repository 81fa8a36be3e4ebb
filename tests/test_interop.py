"""Networks across libraries: diffusers' schedulers and k-diffusion's calls give the images that our samplers give."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffzoo import Condition, GaussianProcess, UserError, pipeline
from diffzoo.generation import Pipeline
from diffzoo.interop import KDenoiser, as_diffusers, from_diffusers, from_k_diffusion
from diffzoo.process import X0, Cosine, DiscreteBetas, Eps, Flow, LinearTime, Straight, VarianceExploding
from diffzoo.rng import ImageNoise
from diffzoo.sampling import DDIM, Denoiser, Heun, sample


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline("simple_uvit_xs_32.emoji", "cpu")


class Normal:
    """The exact network for data of N(0, s^2), whatever a process wants it to say."""

    def __init__(self, process: GaussianProcess, s: float):
        self.process, self.s = process, s

    def __call__(self, z: Tensor, level: Tensor, cond: Condition | None = None) -> Tensor:
        alpha, sigma = (c.to(z)[:, None, None, None] for c in self.process.coefficients(level))
        x = alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2) * z
        a, b = self.process.prediction.coefficients(alpha, sigma)
        return a * x + b * (z - alpha * x) / sigma

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return cond


@pytest.mark.parametrize(
    "process",
    [
        GaussianProcess(Cosine(-12, 12)),
        GaussianProcess(DiscreteBetas("scaled_linear"), prediction=Eps()),
        GaussianProcess(LinearTime(-9, 9), Straight(), Flow()),
        GaussianProcess(Cosine(-9, 9), VarianceExploding(), X0()),
    ],
    ids=["cosine", "table", "flow", "exploding"],
)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_a_denoiser_by_sigma_is_the_closed_form(process: GaussianProcess, sigma: float) -> None:
    from diffzoo.process import TimeConditioning

    process = GaussianProcess(process.schedule, process.path, process.prediction, TimeConditioning())
    x, s = torch.randn(2, 3, 4, 4), 0.7
    model = KDenoiser(Denoiser(Normal(process, s), process))
    assert model.sigma_min < sigma < model.sigma_max
    got = model(x, torch.full((2,), sigma))
    torch.testing.assert_close(got, x * s**2 / (s**2 + sigma**2), rtol=2e-4, atol=1e-5)


def euler_by_sigma(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Tensor]) -> Tensor:
    """Euler's method as k-diffusion calls a model: x = data + sigma noise, one sigma per image."""
    for sigma, following in pairwise(sigmas):
        d = (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
        x = x + d * (following - sigma)
    return x


def test_samplers_over_sigma_find_the_images_of_ours(pipe: Pipeline) -> None:
    label, seeds = torch.tensor([3, 7]), [0, 1]
    model = KDenoiser(pipe.generator.denoiser)
    ours = DDIM(steps=12, clip=None)
    times = ours.times(pipe.process)
    sigmas = torch.exp(-pipe.process.logsnr(times) / 2).float()
    sigmas[-1] = 0
    start = ImageNoise(seeds).normal(pipe.generator.shape) * math.hypot(1, float(sigmas[0]))
    got = euler_by_sigma(model, start, sigmas, {"label": label})
    want = sample(pipe.generator.denoiser, ours, pipe.generator.shape, seeds, Condition(label=label))
    # DDIM is Euler's method in this variable
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


def test_a_scheduler_of_diffusers_finds_the_images_of_ours(pipe: Pipeline) -> None:
    from diffusers import DDIMScheduler

    label, seeds = torch.tensor([3, 7]), [0, 1]
    network, config = as_diffusers(pipe.generator.denoiser)
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(10)
    x = ImageNoise(seeds).normal(pipe.generator.shape)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, class_labels=label).sample, t, x).prev_sample
    want = sample(
        pipe.generator.denoiser, DDIM(steps=10, clip=None), pipe.generator.shape, seeds, Condition(label=label)
    )
    torch.testing.assert_close(x, want, atol=2e-3, rtol=0)


def test_a_network_of_diffusers_samples_here_as_there() -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        8, 3, 3, block_out_channels=(16, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=4, num_class_embeds=4,
    ).eval()  # fmt: skip
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = DDIMScheduler(beta_schedule=kind, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(5)
        denoise = from_diffusers(model, scheduler)
        want, label = ImageNoise([5]).normal((3, 8, 8)), torch.tensor([2])
        got = sample(denoise, DDIM(steps=5, clip=None), (3, 8, 8), [5], Condition(label=label))
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = model(want, t, class_labels=label).sample
                want = scheduler.step(output, t, want).prev_sample
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    with pytest.raises(UserError, match="expected a scheduler with betas linear"):
        from_diffusers(model, DDIMScheduler(trained_betas=[0.1, 0.2]))


def test_a_model_of_k_diffusion_samples_here() -> None:
    s = 0.5

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (s**2 / (s**2 + sigma**2))[:, None, None, None]

    denoise = from_k_diffusion(model, 0.002, 80)
    images = sample(denoise, Heun(steps=40), (1, 16, 16), range(64))
    assert float(images.std()) == pytest.approx(s, rel=0.05)
