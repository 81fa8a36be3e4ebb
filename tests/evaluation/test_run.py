"""The run: equal for any number of processes, after a kill, and as a prefix of a longer one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evaluation.stand_ins import METRICS, StandInImages, protocol, reference, smooth_images

from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, Result, RunOptions, evaluate
from diffzoo.evaluation.measure import Features, measure
from diffzoo.evaluation.run import result_path
from diffzoo.metrics import Moments, extract, frechet_distance, load_features


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"))


def settings(folder: Path, **changes: object) -> RunOptions:
    return RunOptions(**{"out": folder, "block_size": 40, **changes})


def test_values_are_those_of_the_plain_computation(tmp_path: Path, ref: Reference) -> None:
    result = evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    network = load_features("random-conv")
    pixels = ((smooth_images(range(150)) + 1) * 127.5).round().to(torch.uint8)
    mine, real = extract(network, pixels), ref.features(network, "pool")
    want = frechet_distance(Moments.of(mine["pool"]), Moments.of(real))
    assert result.values["frechet:random-conv"].value == pytest.approx(want, rel=1e-9)
    direct = measure(
        result.protocol, Features({("random-conv", k): v for k, v in mine.items()}), ref, {"random-conv": network}
    )
    for name in METRICS:
        assert result.values[name].value == pytest.approx(direct[name].value, rel=1e-6), name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_result(tmp_path: Path, ref: Reference, processes: int) -> None:
    (tmp_path / "log").mkdir()
    one = evaluate(StandInImages(), protocol(), ref, settings(tmp_path / "one"))
    source = StandInImages(log=str(tmp_path / "log"))
    many = evaluate(source, protocol(), ref, settings(tmp_path / "many", processes=processes))
    assert one.same_numbers() == many.same_numbers()
    assert len(list((tmp_path / "log").iterdir())) == 4
    assert many.timing["images_made"] == 150


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, ref: Reference) -> None:
    whole = evaluate(StandInImages(), protocol(), ref, settings(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(StandInImages(stop_at=100), protocol(), ref, settings(tmp_path / "stopped"))
    (tmp_path / "log").mkdir()
    resumed = evaluate(StandInImages(log=str(tmp_path / "log")), protocol(), ref, settings(tmp_path / "stopped"))
    assert resumed.same_numbers() == whole.same_numbers()
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["120_30", "80_40"]


def test_damaged_and_foreign_blocks_are_made_again(tmp_path: Path, ref: Reference) -> None:
    first = evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    (path,) = (tmp_path / "blocks").glob("*/00001.features.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    again = evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    assert (again.same_numbers(), again.timing["images_made"]) == (first.same_numbers(), 40)
    other = evaluate(StandInImages(tint=0.3), protocol(), ref, settings(tmp_path))
    assert other.timing["images_made"] == 150
    assert other.values["frechet:random-conv"].value > 2 * first.values["frechet:random-conv"].value


def test_images_of_another_device_or_version_are_not_mixed_in(
    tmp_path: Path, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(StandInImages(stop_at=100), protocol(), ref, settings(tmp_path))
    monkeypatch.setattr("diffzoo.evaluation.run.hardware", lambda _: "another card")
    assert evaluate(StandInImages(), protocol(), ref, settings(tmp_path)).timing["images_made"] == 150


def test_fewer_images_are_a_prefix_of_more(tmp_path: Path, ref: Reference) -> None:
    short = evaluate(StandInImages(), protocol(160), ref, settings(tmp_path / "short"))
    evaluate(StandInImages(), protocol(200), ref, settings(tmp_path / "long"))
    prefix = evaluate(StandInImages(), protocol(160), ref, settings(tmp_path / "long"))
    assert prefix.timing["images_made"] == 0
    assert prefix.same_numbers() == short.same_numbers()
    assert evaluate(StandInImages(), protocol(200), ref, settings(tmp_path / "short")).timing["images_made"] == 40


@pytest.mark.parametrize(("n", "files"), [(250, [100, 100, 50]), (5000, [1000] * 5)])
def test_blocks_are_of_a_thousand_seeds_and_smaller_for_few_images(
    tmp_path: Path, ref: Reference, n: int, files: list[int]
) -> None:
    (tmp_path / "log").mkdir()
    source = StandInImages(log=str(tmp_path / "log"), size=8)
    evaluate(source, protocol(n, metrics=("inception-score:random-conv",)), ref, RunOptions(out=tmp_path))
    counts = [
        int(p.name.split("_")[1]) for p in sorted((tmp_path / "log").iterdir(), key=lambda p: int(p.name.split("_")[0]))
    ]
    assert counts == files


def test_block_size_changes_no_value(tmp_path: Path, ref: Reference) -> None:
    a = evaluate(StandInImages(), protocol(), ref, settings(tmp_path / "a", block_size=50))
    b = evaluate(StandInImages(), protocol(), ref, settings(tmp_path / "b", block_size=150))
    for name in METRICS:
        assert a.values[name].value == pytest.approx(b.values[name].value, rel=1e-6), name


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from evaluation.stand_ins import StandInImages, protocol
from diffzoo.evaluation import Reference, RunOptions, evaluate

class Slow(StandInImages):
    def images(self, start, count):
        time.sleep(0.4)
        return super().images(start, count)

if __name__ == "__main__":
    evaluate(Slow(), protocol(), Reference.open({reference!r}), RunOptions(out={out!r}, block_size=10, processes={n}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, ref: Reference, processes: int) -> None:
    out = tmp_path / "killed"
    script = tmp_path / "slow.py"
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    script.write_text(KILLED.format(paths=paths, reference=str(ref.path), out=str(out), n=processes))
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 100
    while len(list(out.glob("blocks/*/*.features.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers notice that their parent is gone
    there = len(list(out.glob("blocks/*/*.features.safetensors")))
    assert 3 <= there < 15
    time.sleep(1)
    assert len(list(out.glob("blocks/*/*.features.safetensors"))) == there, "a worker outlived its parent"
    resumed = evaluate(StandInImages(), protocol(), ref, settings(out, block_size=10))
    whole = evaluate(StandInImages(), protocol(), ref, settings(tmp_path / "whole", block_size=10))
    assert resumed.timing["images_made"] == 150 - 10 * there
    assert resumed.same_numbers() == whole.same_numbers()


def test_the_result_file_reads_back_and_has_the_hubs_form(tmp_path: Path, ref: Reference) -> None:
    import yaml
    from huggingface_hub._eval_results import eval_result_entries_to_yaml, parse_eval_result_entries

    result = evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    path = tmp_path / "test_150.json"
    assert Result.load(path).to_dict() == result.to_dict()
    data = yaml.safe_load((tmp_path / ".eval_results" / "test_150.yaml").read_text())
    entries = parse_eval_result_entries(data)  # the Hub client's own reader
    assert [e.value for e in entries] == [v.value for v in result.values.values()]
    assert all(result.protocol.sha256 in str(e.notes) for e in entries)
    assert eval_result_entries_to_yaml(entries) == data


def test_an_edited_result_is_refused(tmp_path: Path, ref: Reference) -> None:
    evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    path = tmp_path / "test_150.json"
    data = json.loads(path.read_text())
    data["protocol"]["rounding"] = "truncate"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="hash of its protocol does not fit"):
        Result.load(path)


def test_the_result_of_another_plan_is_kept(tmp_path: Path, ref: Reference) -> None:
    first = evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 1
    second = evaluate(StandInImages(tint=0.3), protocol(), ref, settings(tmp_path))
    assert Result.load(tmp_path / "test_150.json").same_numbers() == first.same_numbers()
    path = result_path(tmp_path, second.plan, second.protocol)
    assert path.name.startswith("test_150_")
    assert Result.load(path).same_numbers() == second.same_numbers()
    assert len(list((tmp_path / ".eval_results").iterdir())) == 2


@pytest.mark.parametrize(
    "damage", [{"plan": None}, {"values": {"fid": {"number": 3}}}, {"protocol": None}, {"plan_sha256": None}]
)
def test_half_a_result_is_refused(tmp_path: Path, ref: Reference, damage: dict) -> None:
    evaluate(StandInImages(), protocol(), ref, settings(tmp_path))
    path = tmp_path / "test_150.json"
    data = {**json.loads(path.read_text()), **damage}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    with pytest.raises(UserError, match="no whole result"):
        Result.load(path)


def test_kept_images_are_the_measured_ones(tmp_path: Path, ref: Reference) -> None:
    import numpy as np

    first = evaluate(StandInImages(), protocol(), ref, settings(tmp_path, keep_images=True))
    with np.load(tmp_path / "samples.npz") as archive:
        pixels = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(pixels, ((smooth_images(range(150)) + 1) * 127.5).round().to(torch.uint8))
    from diffzoo.evaluation.image_files import NpzImages

    again = evaluate(NpzImages(str(tmp_path / "samples.npz")), protocol(), ref, settings(tmp_path / "npz"))
    for name in METRICS:
        assert again.values[name].value == first.values[name].value, name
