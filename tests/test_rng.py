"""Random numbers of training: functions of the place in the stream, stratified, independent between purposes."""

import pytest
import torch

from diffzoo import rng

CPU = torch.device("cpu")


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    whole = rng.normal("eps", 3, range(10), (2, 4), CPU)
    parts = [rng.normal("eps", 3, part, (2, 4), CPU) for part in (range(7, 10), range(7))]
    assert torch.equal(torch.cat([parts[1], parts[0]]), whole)


@pytest.mark.parametrize("change", [{"purpose": "latent"}, {"seed": 4}, {"index": range(10, 20)}], ids=str)
def test_noise_differs_by_purpose_seed_and_place(change: dict) -> None:
    base = {"purpose": "eps", "seed": 3, "index": range(10)}
    first = rng.normal(**base, shape=(8,), device=CPU)
    second = rng.normal(**{**base, **change}, shape=(8,), device=CPU)
    assert (first - second).abs().min() > 0


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours() -> None:
    noise = rng.normal("eps", 0, range(2000), (20,), CPU)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_random_numbers_are_float32_inside_a_bfloat16_step() -> None:
    """Lightning makes bfloat16 the default dtype there (findings/): `torch.rand` would give 0 once in 512."""
    made = [
        lambda: rng.normal("eps", 3, range(4), (2, 4), CPU),
        lambda: rng.times(3, range(4), CPU),
        lambda: rng.uniform("condition", 3, range(4), CPU),
    ]
    expected = [make() for make in made]
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = [make() for make in made]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("start", [0, 1, 12_345, 10**9])
@pytest.mark.parametrize("n", [8, 24, 512])
def test_times_of_neighbours_are_stratified(start: int, n: int) -> None:
    t = rng.times(0, range(start, start + n), CPU).double().sort().values
    gaps = torch.diff(t, append=t[:1] + 1)
    assert t.min() >= 0
    assert t.max() < 1
    # three-gap theorem: the golden ratio's widest gap among n points is below 1.9 / n, far from random's log(n) / n
    assert gaps.max() < 1.9 / n


def test_times_are_uniform_and_differ_by_seed() -> None:
    t = rng.times(0, range(10_000), CPU)
    histogram = torch.histc(t, 10, 0, 1)
    assert (histogram - 1000).abs().max() < 5
    assert (rng.times(1, range(10), CPU) - t[:10]).abs().min() > 1e-4


def test_uniform_is_uniform() -> None:
    u = rng.uniform("condition", 0, range(4000), CPU)
    assert abs((u < 0.1).float().mean() - 0.1) < 0.015
    assert torch.equal(rng.uniform("condition", 0, [17], CPU), u[17:18])
