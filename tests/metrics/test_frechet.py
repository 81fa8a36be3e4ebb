"""Moments and the Fréchet distance: closed forms, identities, other implementations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics import FrechetReference, Moments, frechet_distance, frechet_ratio, merge_all
from diffzoo.metrics.in_training import FrechetDistance


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_merged_parts_are_the_whole(sizes: list[int], offset: float) -> None:
    sizes = [3, *sizes]
    x = normals(sum(sizes), 5) + offset
    merged = merge_all(Moments.of(part) for part in x.split(sizes))
    mean, covariance = exact_moments(x)
    assert merged.n == len(x)
    np.testing.assert_allclose(merged.mean.numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance().numpy(), covariance, rtol=1e-8, atol=1e-9)


def test_a_large_offset_costs_no_digits() -> None:
    # sums of squares would keep only the last four digits of this covariance
    x = normals(500, 3) + 1e6
    parts = merge_all(Moments.of(p) for p in x.split(100))
    torch.testing.assert_close(parts.covariance(), Moments.of(x - 1e6).covariance(), rtol=1e-8, atol=1e-9)


def test_moments_refuse_what_is_not_finite() -> None:
    x = normals(10, 3)
    x[4, 1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        Moments.of(x)


def test_a_single_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        Moments.of(normals(1, 3)).covariance()


def test_closed_form_of_commuting_covariances() -> None:
    # diagonal covariances: d^2 = |m1 - m2|^2 + sum (s1 - s2)^2
    m1, m2 = normals(1, 6, 1)[0], normals(1, 6, 2)[0]
    s1, s2 = normals(1, 6, 3)[0].abs(), normals(1, 6, 4)[0].abs()
    rotation = torch.linalg.qr(normals(6, 6, 5)).Q
    want = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    c1, c2 = (rotation @ torch.diag(s.square()) @ rotation.T for s in (s1, s2))
    assert FrechetReference.of(m1, c1).distance(m2, c2) == pytest.approx(float(want), rel=1e-10)


def rotated(spectrum: Tensor) -> Tensor:
    """A covariance with these eigenvalues; all have the same eigenvectors."""
    basis = torch.linalg.qr(normals(len(spectrum), len(spectrum), 5)).Q
    return (basis * spectrum) @ basis.T


SPECTRA = {
    # dimension, smallest exponent of ten below 10, factor, how many eigenvalues are zero
    "narrow": (128, 0, 2.0, 0),
    "wide": (512, -6, 1.02, 0),
    "wide, nearly equal": (512, -7, 1.001, 0),
    "wide, half the rank": (256, -6, 1.1, 128),
}


@pytest.mark.parametrize(("d", "low", "factor", "zeros"), SPECTRA.values(), ids=SPECTRA)
def test_wide_spectra(d: int, low: int, factor: float, zeros: int) -> None:
    """For S2 = f S1 the distance is (1 - sqrt f)^2 tr S1."""
    spectrum = torch.logspace(1, low, d, dtype=torch.float64)
    spectrum[d - zeros :] = 0
    want = float(spectrum.sum() * (1 - factor**0.5) ** 2)
    mean, first, second = torch.zeros(d), rotated(spectrum), rotated(factor * spectrum)
    assert FrechetReference.of(mean, first).distance(mean, second) == pytest.approx(want, rel=1e-7)
    # the metric in training, of features that have the second covariance exactly
    basis = torch.linalg.qr(normals(d, d, 5)).Q
    rows = (basis * (factor * spectrum).sqrt()).T * ((2 * d - 1) / 2) ** 0.5
    metric = FrechetDistance(mean, first)
    metric.update(torch.cat([rows, -rows]))
    assert float(metric.compute()) == pytest.approx(want, rel=1e-7)


@pytest.mark.slow
def test_wide_spectrum_of_inception_features() -> None:
    spectrum = torch.logspace(1, -6, 2048, dtype=torch.float64)
    distance = FrechetReference.of(torch.zeros(2048), rotated(spectrum))
    assert distance.distance(torch.zeros(2048), rotated(1.02 * spectrum)) == pytest.approx(0.12624147, abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(600, 30), (90, 30)])
def test_changes_are_those_of_the_distance(n: int, d: int) -> None:
    """The jackknife by the derivative, with the one that measures every distance; the error is of second order."""
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    reference = FrechetReference.of(torch.zeros(d), rotated(1.5 * scales))
    parts = [Moments.of(p) for p in (normals(n, d) * scales).split(n // 10)]
    whole = merge_all(parts)
    without = [merge_all(p for p in parts if p is not left_out) for left_out in parts]
    exact = torch.tensor([reference.distance_of(m) for m in without])
    linear = torch.tensor(reference.changes(whole, without))
    assert float(linear.std()) == pytest.approx(float(exact.std()), rel=0.1)
    # along a line, the second-order rest falls with the square of the step
    rest = []
    for step in (1e-2, 1e-3):
        near = Moments(whole.n, whole.mean + step * scales, whole.scatter + step * without[0].scatter)
        rest.append(
            abs(reference.distance_of(near) - reference.distance_of(whole) - reference.changes(whole, [near])[0])
        )
    assert rest[1] < rest[0] / 50


def test_closed_form_in_two_dimensions() -> None:
    # tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2
    a, b = (v @ v.T for v in (normals(2, 2, 1), normals(2, 2, 2)))
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    want = a.trace() + b.trace() - 2 * root
    assert FrechetReference.of(torch.zeros(2), a).distance(torch.zeros(2), b) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 16), (10, 16), (17, 16)], ids=["full", "singular", "barely full"])
def test_against_the_matrix_square_root_of_scipy(n: int, d: int) -> None:
    from scipy.linalg import sqrtm

    x, y = normals(n, d, 1), normals(n, d, 2) * 1.5 + 0.3
    (m1, c1), (m2, c2) = exact_moments(x), exact_moments(y)
    jitter = 1e-12 * np.eye(d)  # SciPy's root needs full rank
    want = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.trace(np.real(sqrtm((c1 + jitter) @ (c2 + jitter))))
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 16), (10, 12, 16), (3, 40, 16)])
def test_against_the_nuclear_norm_of_the_data(n: int, m: int, d: int) -> None:
    # with S = A^T A of the centred data, tr (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T, at any rank
    x, y = normals(n, d, 1), normals(m, d, 2) * 1.5 + 0.3
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    root = torch.linalg.svdvals(a @ b.T).sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(float(want), rel=1e-12)


def test_against_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = normals(300, 24, 1).float(), (normals(260, 24, 2) * 1.3 + 0.1).float()
    statistics = [fid_features_to_statistics(v) for v in (x, y)]
    want = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(want, rel=1e-6)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12))
def test_symmetric_not_negative_and_zero_with_itself(n: int, m: int, d: int) -> None:
    x, y = Moments.of(normals(n, d, 1)), Moments.of(2 * normals(m, d, 2))
    distance = frechet_distance(x, y)
    assert distance == pytest.approx(frechet_distance(y, x), rel=1e-6, abs=1e-6)
    assert distance >= -1e-6
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_invariant_under_rotation_and_shift() -> None:
    x, y = normals(50, 8, 1), 1.4 * normals(60, 8, 2)
    rotation, shift = torch.linalg.qr(normals(8, 8, 3)).Q, normals(1, 8, 4)
    plain = frechet_distance(Moments.of(x), Moments.of(y))
    moved = frechet_distance(Moments.of(x @ rotation + shift), Moments.of(y @ rotation + shift))
    assert moved == pytest.approx(plain, rel=1e-9)


def test_ratio_of_held_out_images_is_one() -> None:
    """In two representations; a shift of one deviation in one of them shows there alone."""
    reference, held_out = normals(4000, 6, 1), normals(4000, 6, 2)
    projections = normals(6, 5, 3), normals(6, 4, 4)

    def distances(x: Tensor) -> list[float]:
        return [frechet_distance(Moments.of(x @ p), Moments.of(reference @ p)) for p in projections]

    floor = distances(held_out)
    assert frechet_ratio(floor, floor) == pytest.approx(1)
    assert frechet_ratio([2 * floor[0], 4 * floor[1]], floor) == pytest.approx(3)
    assert frechet_ratio(distances(held_out + 1), floor) > 100
    for wrong in ([], floor[:1]):
        with pytest.raises(UserError, match="held-out distance per distance"):
            frechet_ratio(floor, wrong)
    with pytest.raises(UserError, match="not positive"):
        frechet_ratio(floor, [0.0, 1.0])


def test_statistics_of_another_network_are_refused() -> None:
    reference = FrechetReference.of(torch.zeros(4), torch.eye(4))
    with pytest.raises(UserError, match="have 3 dimensions and the reference 4"):
        reference.distance(torch.zeros(3), torch.eye(3))
    with pytest.raises(UserError, match=r"expected a covariance of shape \(4, 4\)"):
        FrechetReference.of(torch.zeros(4), torch.eye(3))
    with pytest.raises(UserError, match="not finite"):
        FrechetReference.of(torch.full((4,), float("nan")), torch.eye(4))
    with pytest.raises(UserError, match="not symmetric"):
        FrechetReference.of(torch.zeros(4), torch.ones(4, 4).tril())
    with pytest.raises(UserError, match="not symmetric"):
        reference.distance(torch.zeros(4), torch.ones(4, 4).tril())


def test_merging_in_one_order_is_bit_exact() -> None:
    x = normals(40, 6).split(8)
    first, second = (merge_all(Moments.of(p) for p in x) for _ in range(2))
    assert torch.equal(first.scatter, second.scatter)
    assert all(merge_all(Moments.of(x[i]) for i in p).n == 40 for p in itertools.permutations(range(5)))


@pytest.mark.slow
def test_fid_at_2048_dimensions_takes_less_than_20_seconds_of_a_processor() -> None:
    import time

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3000, 2048, generator=generator) for _ in range(2))
    start = time.process_time()
    value = frechet_distance(Moments.of(x), Moments.of(y))
    assert time.process_time() - start < 20
    # two samples of one Gaussian: a bias alone, which grows with the dimension and falls with the number
    assert 100 < value < 2048
