"""Inception Score, KID, CMMD, CLIPScore and the metrics of neighbours, against closed forms and other code."""

import math

import pytest
import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.metrics import (
    authentic,
    clip_scores,
    cmmd,
    density_coverage,
    inception_score,
    kid,
    kid_subsets,
    nearest,
    precision_recall,
    vendi_score,
)
from diffzoo.metrics.inception_score import score_of_sums, score_sums
from diffzoo.metrics.neighbours import squared_radii


def normals(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# -- Inception Score


def test_sure_and_balanced_predictions_score_the_number_of_classes() -> None:
    logits = 100 * torch.eye(7).repeat(3, 1)
    assert inception_score(logits)[0] == pytest.approx(7, rel=1e-9)


def test_constant_predictions_score_one() -> None:
    assert inception_score(normals(1, 9).repeat(20, 1))[0] == pytest.approx(1, rel=1e-9)


def test_a_file_sorted_by_class_scores_lower() -> None:
    logits = 100 * torch.eye(4).repeat_interleave(10, 0)
    assert inception_score(logits, 40)[0] == pytest.approx(4)
    assert inception_score(logits, 10)[0] == pytest.approx(1)


def test_inception_score_against_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * normals(200, 30)
    want = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, 50)[0] == pytest.approx(want, rel=1e-9)


def test_score_sums_add_over_parts() -> None:
    logits = normals(60, 5)
    whole = score_of_sums(score_sums(logits))
    assert score_of_sums(sum(score_sums(p) for p in logits.split(17))) == pytest.approx(whole, rel=1e-12)
    assert inception_score(logits, 60)[0] == pytest.approx(whole, rel=1e-12)


def test_inception_score_refuses_nan_and_nothing() -> None:
    with pytest.raises(UserError, match="not finite"):
        inception_score(torch.full((3, 4), float("nan")))
    with pytest.raises(UserError, match="at least one image"):
        inception_score(torch.empty(0, 4))


# -- kernels


def test_kid_against_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    x, y = normals(40, 12, 1).double().numpy(), (normals(40, 12, 2) * 1.2).double().numpy()
    settings = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0}
    want = mmd2(kernel_poly(x, x, **settings), kernel_poly(x, y, **settings), kernel_poly(y, y, **settings))
    assert kid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(float(want), rel=1e-9)


def test_kid_is_unbiased_where_the_biased_estimate_is_not() -> None:
    values = torch.tensor([kid(normals(10, 3, 2 * i), normals(10, 3, 2 * i + 1)) for i in range(400)])
    error = values.std() / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * float(error)
    assert float(error) < 0.1


def test_kid_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normals(30, 4, 1), normals(26, 4, 2)
    whole = kid(x, y)
    monkeypatch.setattr("diffzoo.metrics.kernels.ROWS", 7)
    assert kid(x, y) == pytest.approx(whole, rel=1e-12)


def test_kid_of_one_subset_of_all_is_kid() -> None:
    x, y = normals(20, 4, 1), normals(20, 4, 2)
    assert kid_subsets(x, y, subsets=1, size=20)[0] == pytest.approx(kid(x, y), rel=1e-9)
    assert kid_subsets(x, y, subsets=5, size=10) == kid_subsets(x, y, subsets=5, size=10)


def test_cmmd_in_closed_form() -> None:
    # one unit vector against its opposite: k(x, x) = 1, k(x, -x) = exp(-4 / (2 sigma^2))
    x = torch.tensor([[3.0, 4.0]])
    assert cmmd(x, -2 * x) == pytest.approx(1000 * 2 * (1 - math.exp(-4 / 200)), rel=1e-9)
    assert cmmd(x, 5 * x) == pytest.approx(0, abs=1e-9)


def test_clip_score_is_a_floored_cosine() -> None:
    images, captions = torch.tensor([[1.0, 0], [1, 0], [0, 2]]), torch.tensor([[2.0, 2], [-1, 0], [0, 3]])
    assert clip_scores(images, captions).tolist() == pytest.approx([100 / math.sqrt(2), 0, 100])
    with pytest.raises(UserError, match="one caption embedding per image"):
        clip_scores(images, captions[:2])


# -- Vendi score


def test_vendi_score_counts_different_images() -> None:
    assert vendi_score(normals(1, 9).repeat(20, 1)) == pytest.approx(1)
    assert vendi_score(3 * torch.eye(12)) == pytest.approx(12)
    assert vendi_score(torch.eye(5).repeat(7, 1)) == pytest.approx(5)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_vendi_score_against_its_definition(order: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the eigenvalues of the n x n kernel."""
    monkeypatch.setattr("diffzoo.metrics.vendi.ROWS", 7)
    x = normals(30, 12).double()
    unit = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T / 30).clamp_min(0)
    values = values[values > 1e-12]
    want = -(values * values.log()).sum() if order == 1 else values.pow(order).sum().log() / (1 - order)
    assert vendi_score(x, order) == pytest.approx(float(want.exp()), rel=1e-6)


def test_vendi_score_refuses_what_has_no_direction() -> None:
    for features, words in ((torch.zeros(3, 4), "zero or not finite"), (torch.empty(0, 4), "at least one image")):
        with pytest.raises(UserError, match=words):
            vendi_score(features)


# -- neighbours


def brute_force(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances from the differences."""
    return (x.double()[:, None] - y.double()[None]).square().sum(-1)


def collapsed(n: int) -> Tensor:
    """Near copies of one image: float32 products cannot tell them apart."""
    return normals(1, 6, 7) + 1e-4 * normals(n, 6, 8)


SETS = {
    "distinct": (normals(60, 6, 1), 1.2 * normals(70, 6, 2)),
    # small integers: most distances are ties, many images are duplicates
    "ties": ((2 * normals(80, 3, 3)).round(), (2 * normals(90, 3, 4)).round()),
    "far from the origin": (normals(40, 4, 1) + 1e4, normals(50, 4, 2) + 1e4),
    "collapsed": (collapsed(90), torch.cat([collapsed(60).flip(0), normals(40, 6, 3)])),
    "one image": (torch.ones(30, 4), torch.ones(40, 4)),
}


@pytest.mark.parametrize("rows", [7, 2048])
@pytest.mark.parametrize(("x", "y"), SETS.values(), ids=SETS)
def test_neighbours_against_their_definition(x: Tensor, y: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decision, in blocks and as a whole, against exact distances of all pairs."""
    monkeypatch.setattr("diffzoo.metrics.neighbours.ROWS", rows)
    between = brute_force(x, y)

    def radii(v: Tensor, k: int) -> Tensor:
        return brute_force(v, v).sort(dim=1).values[:, k]

    assert torch.equal(squared_radii(x, 3), radii(x, 3))
    found = precision_recall(x, y)
    assert torch.equal(found.sample_inside, (between <= radii(y, 3)[None]).any(1))
    assert torch.equal(found.reference_inside, (between <= radii(x, 3)[:, None]).any(0))
    balls = density_coverage(x, y)
    assert torch.equal((balls.balls * 5).round().long(), (between < radii(y, 5)[None]).sum(1))
    assert torch.equal(balls.covered, (between < radii(y, 5)[None]).any(0))
    distance, index = nearest(x, y, k=3)
    assert torch.equal(distance, between.sort(dim=1).values[:, :3].sqrt())
    assert torch.equal(between.gather(1, index).sqrt(), distance)
    assert torch.equal(authentic(x, y), radii(y, 1)[index[:, 0]] < between.amin(1))


def test_a_set_against_itself() -> None:
    x = normals(500, 64)
    found = density_coverage(x, x)
    assert found.density == pytest.approx(1, abs=1e-12)
    assert found.coverage == 1
    assert not authentic(x, x).any()


def test_copies_are_not_authentic() -> None:
    reference = normals(200, 8)
    sample = torch.cat([normals(50, 8, 1), reference[:50] + 1e-3])
    found = authentic(sample, reference)
    assert not found[50:].any()
    assert found[:50].double().mean() > 0.4


def test_radii_leave_out_the_row_itself() -> None:
    line = torch.tensor([[0.0], [1], [3], [7]], dtype=torch.float64)
    assert squared_radii(line, 1).tolist() == [1, 1, 4, 16]
    assert squared_radii(line, 3).tolist() == [49, 36, 16, 49]
    with pytest.raises(UserError, match="more than 4 images, got 4"):
        squared_radii(line, 4)


def test_precision_and_recall_of_the_same_and_of_far_sets() -> None:
    x = normals(60, 4)
    same, far = precision_recall(x, x), precision_recall(x, x + 100)
    assert (same.precision, same.recall) == (1, 1)
    assert (far.precision, far.recall) == (0, 0)


def test_a_collapsed_model_keeps_precision_and_loses_recall() -> None:
    reference = normals(200, 3)
    collapsed = reference[:1] + 1e-3 * normals(200, 3, 1)
    found = precision_recall(collapsed, reference)
    assert found.precision == 1
    assert found.recall < 0.1


def test_precision_recall_against_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = normals(80, 6, 1).double(), normals(90, 6, 2).double() * 1.2
    want = calculate_precision_recall_full(x, y, neighborhood=3)
    found = precision_recall(x, y)
    assert (found.precision, found.recall) == pytest.approx(want, abs=1e-6)


def test_nearest_finds_planted_copies() -> None:
    database = normals(100, 8)
    distance, index = nearest(database[[7, 42]] + 1e-4, database, k=3)
    assert index[:, 0].tolist() == [7, 42]
    assert bool((distance.diff(dim=1) >= 0).all())


def test_features_of_two_networks_are_refused() -> None:
    for metric in (precision_recall, density_coverage, nearest, authentic):
        with pytest.raises(UserError, match="4 features and the reference 5"):
            metric(normals(20, 4), normals(20, 5))
