"""Sampling never waits for the device: no copy between host and device, no number read back, within a batch."""

import pytest
import torch
from device_copies import counted_copies
from torch import Tensor

from diffzoo.process import Eps, GaussianProcess, V
from diffzoo.rng import ImageNoise
from diffzoo.sampling import (
    DDIM,
    Ancestral,
    ClassifierFree,
    ClassifierGuidance,
    Denoiser,
    DPMSolverMultistep,
    Euler,
    Heun,
    Interval,
    Sampler,
    UniPC,
)
from diffzoo.sampling.denoiser import Denoise
from diffzoo.sampling.loop import integrate
from diffzoo.typing import Condition

SAMPLERS: list[Sampler] = [
    DDIM(steps=6, clip=1.0),
    DDIM(steps=6, eta=0.5),
    Ancestral(steps=6),
    DPMSolverMultistep(steps=6),
    UniPC(steps=6),
    Heun(steps=6, churn=2.0),
    Euler(steps=6, final="denoise"),
]


class Network:
    def __call__(self, z: Tensor, noise_level: Tensor, cond: Condition | None = None) -> Tensor:
        return 0.5 * z + noise_level.reshape(-1, 1, 1, 1)

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return Condition(label=torch.zeros_like(cond.label)) if cond is not None and cond.label is not None else None


def denoiser(guided: bool) -> Denoise:
    plain = Denoiser(Network(), GaussianProcess(prediction=Eps() if guided else V(), data_scale=0.5))
    return ClassifierFree(plain, 3.0, interval=Interval(0.2, 0.8)) if guided else plain


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_batch_makes_no_copy_between_devices(sampler: Sampler, guided: bool) -> None:
    """On the meta device, where reading a number back is an error."""
    z, label = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    noise = ImageNoise(range(4), "meta")
    with counted_copies() as copies:
        out = integrate(denoiser(guided), sampler, z, noise, Condition(label=label) if guided else None)
    assert out.shape == z.shape
    assert copies == []


def test_classifier_guidance_makes_no_copy_either() -> None:
    z, label = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    guided = ClassifierGuidance(denoiser(guided=False), lambda z, level: z.flatten(1) + level[:, None], 2.0)
    noise = ImageNoise(range(4), "meta")
    with counted_copies() as copies:
        integrate(guided, DDIM(steps=3, clip=1.0), z, noise, Condition(label=label))
    assert copies == []


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_batch_never_waits_and_is_one_cuda_graph(sampler: Sampler) -> None:
    denoise, start = denoiser(guided=False), torch.randn(4, 3, 8, 8, device="cuda")
    want = integrate(denoise, sampler, start, ImageNoise(range(4), "cuda"))  # fills the table of coefficients
    noise, captured = ImageNoise(range(4), "cuda"), ImageNoise(range(4), "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = integrate(denoise, sampler, start, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = integrate(denoise, sampler, start, captured)
    graph.replay()
    torch.testing.assert_close(out, want)
