"""Coefficients are remembered for the same times, and only for scalars on the CPU."""

import torch

from diffzoo.process import GaussianProcess
from diffzoo.process.table import tabulated


def test_the_same_objects_are_computed_once() -> None:
    calls = []

    @tabulated
    def double(t: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(t)
        return t * factor

    t, factor = torch.tensor(0.25, dtype=torch.float64), 2.0
    assert double(t, factor) is double(t, factor)
    assert len(calls) == 1
    assert float(double(torch.tensor(0.5, dtype=torch.float64), factor)) == 1.0
    batch = torch.tensor([0.25, 0.5])
    assert double(batch, factor) is not double(batch, factor)
    assert len(calls) == 4


def test_two_processes_do_not_share_their_coefficients() -> None:
    t = torch.tensor(0.25, dtype=torch.float64)
    plain, scaled = GaussianProcess(), GaussianProcess(data_scale=0.5)
    for _ in range(2):
        assert torch.equal(scaled.coefficients(t)[0], 2 * scaled._scaled(scaled.logsnr(t))[0])
        assert not torch.equal(plain.coefficients(t)[0], scaled.coefficients(t)[0])
