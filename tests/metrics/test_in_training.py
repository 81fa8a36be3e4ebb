"""Metrics that add: over batches, and over two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffzoo.metrics import Moments, frechet_distance, inception_score
from diffzoo.metrics.in_training import FrechetDistance, InceptionScore


def data() -> tuple[torch.Tensor, Moments, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(90, 6, generator=g) + 1e4  # an offset that sums of squares would drown in
    reference = Moments.of(torch.randn(80, 6, generator=g).double() * 1.3 + 1e4)
    return features, reference, torch.randn(90, 5, generator=g)


def metrics(reference: Moments) -> tuple[FrechetDistance, InceptionScore]:
    return FrechetDistance(reference.mean, reference.covariance()), InceptionScore(5)


def test_batches_add_up_to_the_whole() -> None:
    features, reference, logits = data()
    fid, score = metrics(reference)
    for f, part in zip(features.split(13), logits.split(13), strict=True):
        fid.update(f)
        score.update(part)
    want = frechet_distance(Moments.of(features), reference)
    assert float(fid.compute()) == pytest.approx(want, rel=1e-9)
    assert float(score.compute()) == pytest.approx(inception_score(logits, 90)[0], rel=1e-9)
    fid.reset()
    fid.update(features[:40])
    want = frechet_distance(Moments.of(features[:40]), reference)
    assert float(fid.compute()) == pytest.approx(want, rel=1e-9)


def test_states_stay_in_double_precision_and_out_of_checkpoints() -> None:
    fid, score = metrics(data()[1])
    for metric in (fid.float(), score.half()):
        metric.update(torch.ones(4, 6 if metric is fid else 5))
        assert metric.compute().dtype == torch.float64
        assert not metric.state_dict()


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, reference, logits = data()
    fid, score = metrics(reference)
    mine = slice(0, 31) if rank == 0 else slice(31, 90)
    fid.update(features[mine])
    score.update(logits[mine])
    torch.save([float(fid.compute()), float(score.compute())], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # by this folder, not by `tests.metrics`: torch-fidelity installs a package `tests` of its own
    commands = [f"import test_in_training; test_in_training.work({rank}, {str(tmp_path)!r})" for rank in range(2)]
    both = [subprocess.Popen([sys.executable, "-c", command], cwd=Path(__file__).parent) for command in commands]
    assert [process.wait() for process in both] == [0, 0]
    features, reference, logits = data()
    want = [frechet_distance(Moments.of(features), reference), inception_score(logits, 90)[0]]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(want, rel=1e-9)
