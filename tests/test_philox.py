"""Philox and its normal numbers: known answers, the closed form, statistics, and the same bits everywhere."""

import math

import pytest
import torch
from torch import Tensor

from diffzoo import philox, rng

CPU = torch.device("cpu")


def _signed(high: int, low: int) -> int:
    return ((high << 32 | low) + 2**63) % 2**64 - 2**63


# known answers of Random123 1.14, philox4x32 with 10 rounds: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_the_known_answers(counter: str, key: str, words: str) -> None:
    element, draw, low, high = (int(w, 16) for w in counter.split())
    first, second = (int(w, 16) for w in key.split())
    got = philox.words(second << 32 | first, *map(torch.tensor, (element, draw, _signed(high, low))))
    assert [f"{int(w):08x}" for w in got] == words.split()


def test_normals_are_box_and_mullers() -> None:
    """Against float64 arithmetic on the same words."""
    place, draw, quads = torch.tensor([5, -3, 2**62]), torch.tensor([0, 1, 2]), 20_000
    a, b, c, d = philox.words(7, torch.arange(quads), draw[:, None], place[:, None])
    want = []
    for first, second in ((a, b), (c, d)):
        radius = (-2 * ((first.double() + 0.5) / 2**32).log()).sqrt()
        angle = ((second & 0x3FFFFFFF).double() + 0.5) / 2**30 * (math.pi / 2) - math.pi / 4
        cosine, sine = angle.cos() * (1 - 2 * (second >> 31)), angle.sin()
        swap = (second >> 30) % 2 == 1
        want += [radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)]
    got = philox.normals(7, place, draw, 4 * quads)
    assert got.dtype == torch.float32
    error = (got - torch.cat(want, 1)).abs()
    assert float(error.max()) < 2e-5  # where the radius is small: an error of the logarithm, divided by the radius
    assert float(error.mean()) < 2e-7


@pytest.mark.parametrize("first", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("second", [0, 2**30, 2**31, 2**32 - 1])
def test_extreme_words_give_finite_numbers(first: int, second: int) -> None:
    x, y = philox._normal_pair(torch.tensor([first]), torch.tensor([second]))
    radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
    # near u = 1 the logarithm is right to 1e-7, so its root to 3e-4
    torch.testing.assert_close(torch.hypot(x, y), torch.tensor([radius]), rtol=1e-6, atol=3e-4)


def test_normals_are_standard_normal() -> None:
    x = philox.normals(rng.key("test"), torch.arange(40), torch.zeros(40, dtype=torch.int64), 50_000).double().flatten()
    n = len(x)
    # five standard errors of each moment of n normal numbers
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    # Kolmogorov-Smirnov; 1.95 / sqrt(n) is passed by chance once in a thousand
    cdf = 0.5 * torch.special.erfc(-x.sort().values / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert float(torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())) < 1.95 / math.sqrt(n)
    assert 4.7 < float(x.abs().max()) < 6.5


def test_neighbours_are_uncorrelated_in_each_word_of_the_counter() -> None:
    place = torch.arange(64).repeat(64)
    x = philox.normals(3, place, torch.arange(64).repeat_interleave(64), 64).reshape(64, 64, 64)
    for axis in range(3):
        size = x.shape[axis] - 1
        correlation = float((x.narrow(axis, 0, size) * x.narrow(axis, 1, size)).mean())
        assert abs(correlation) < 5 / math.sqrt(x.numel())


def test_numbers_do_not_depend_on_the_batch_or_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    place, draw, count = torch.arange(7), torch.full((7,), 2), 1001
    whole = philox.normals(1, place, draw, count)
    monkeypatch.setattr(philox, "_CHUNK", 640)
    assert torch.equal(philox.normals(1, place, draw, count), whole)
    assert torch.equal(philox.normals(1, place[5:6], draw[5:6], count), whole[5:6])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_compiled_kernel_gives_the_same_bits(device: str) -> None:
    kernel = philox.compiled_quads()
    key = rng.key("test")
    keys = philox._key_tensor(key, torch.device(device))
    for rows, quads in ((5, 1000), (2, 33), (9, 4)):
        place, draw = torch.arange(rows) * 2**33, torch.arange(rows)
        want = philox._eager(philox.round_keys(key), place, draw, quads)
        assert torch.equal(kernel(keys, place.to(device), draw.to(device), quads).cpu(), want)


def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_digit(keys: Tensor, place: Tensor, draw: Tensor, quads: int) -> Tensor:
        return philox._eager(keys.tolist(), place, draw, quads) * (1 + 2**-23)

    monkeypatch.setattr(philox, "compiled_quads", lambda: off_by_a_digit)
    monkeypatch.setattr(philox, "_KERNELS", {"cpu": philox._Kernel()})
    place, draw = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    want = philox.normals(1, place, draw, 40)
    philox.compile_now("cpu")
    with pytest.warns(UserWarning, match="rounds otherwise"):
        assert torch.equal(philox.normals(1, place, draw, 40), want)
    assert torch.equal(philox.normals(1, place, draw, 40), want)


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("mps", marks=pytest.mark.gpu("mps"))]
)
def test_every_device_gives_the_same_numbers(device: str) -> None:
    here, there = (rng.ImageNoise([0, 17, 2**62], d) for d in ("cpu", device))
    for one, other in ((here.normal((3, 64, 64)), there.normal((3, 64, 64)).cpu()) for _ in range(3)):
        if device == "cuda":
            assert torch.equal(one, other)
        else:  # no float64 there, so the root is rounded otherwise
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    index, device_ = torch.tensor([0, 5, 2**40]), torch.device(device)
    assert torch.equal(rng.times(1, index, CPU), rng.times(1, index, device_).cpu())
    assert torch.equal(rng.uniform("x", 1, index, CPU), rng.uniform("x", 1, index, device_).cpu())
