"""A model trained here on the demo set, evaluated by one process, by several, and killed and resumed: equal JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data.stand_ins import quiet_trainer

from diffzoo.cli.main import main
from diffzoo.data import DemoData
from diffzoo.evaluation.blocks import _in_turn
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.process import GaussianProcess, V
from diffzoo.runs import Launch, launch
from diffzoo.sampling import DDIM
from diffzoo.training.ema import EMA
from diffzoo.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore")
N, BLOCK = 200, 20
METRICS = ["frechet:random-conv", "kid:random-conv", "precision:random-conv", "recall:random-conv"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = UViTBaoConfig(image_size=16, in_channels=3, num_classes=10, patch=2, width=32, depth=3, heads=2)
    module = DiffusionModule(
        UViTBao(config), process=GaussianProcess(prediction=V()), sampler=DDIM(steps=10, clip=1.0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3),
    )  # fmt: skip
    ema = EMA(decays=[0.5, 0.9], stds=[0.05, 0.1], snapshot_every=10)
    trainer = quiet_trainer(folder / "run", max_steps=40, limit_val_batches=0, callbacks=[ema])
    trainer.fit(module, DemoData(image_size=16, batch_size=16, num_workers=0))
    trainer.save_checkpoint(folder / "run" / "checkpoints" / "step_00000040.ckpt")
    return folder / "run"


@pytest.fixture(autouse=True)
def _references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path_factory.getbasetemp() / "references"))


def arguments(run: Path, out: Path, processes: int = 1, block: int = BLOCK) -> list[str]:
    return [
        "eval", str(run), "--protocol", "demo", "--n", str(N), "--metrics", *METRICS, "--guidance", "1.5",
        "--out", str(out), "--processes", str(processes), "--block-size", str(block), "--device", "cpu", "--quiet",
    ]  # fmt: skip


def numbers(out: Path) -> dict[str, Any]:
    """The JSON but what depends on the day: the time it took, and when."""
    (path,) = out.glob("demo*.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("timing", "date")}


@pytest.fixture(scope="module")
def by_one(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFZOO_REFERENCES", str(tmp_path_factory.getbasetemp() / "references"))
        assert main(arguments(run, out)) == 0
    return numbers(out)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_the_json_of_one(
    run: Path, by_one: dict[str, Any], tmp_path: Path, processes: int
) -> None:
    assert main(arguments(run, tmp_path, processes)) == 0
    assert numbers(tmp_path) == by_one
    assert by_one["values"]["frechet:random-conv"]["value"] > 0
    assert by_one["plan"]["weights_sha256"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_writes_the_same_json(
    run: Path, by_one: dict[str, Any], tmp_path: Path, processes: int
) -> None:
    command = [sys.executable, "-m", "diffzoo", *arguments(run, tmp_path, processes)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("blocks/*/*.features.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5 if processes > 1 else 0)  # workers notice that their parent is gone
    there = len(list(tmp_path.glob("blocks/*/*.features.safetensors")))
    assert 2 <= there <= N // BLOCK
    assert not list(tmp_path.glob("demo*.json")), "killed too late"
    assert main(arguments(run, tmp_path)) == 0
    assert numbers(tmp_path) == by_one
    (result,) = tmp_path.glob("demo*.json")
    assert json.loads(result.read_text())["timing"]["images_made"] == N - there * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_of_a_launcher_write_the_json_of_one(
    run: Path, by_one: dict[str, Any], tmp_path: Path, killed: int
) -> None:
    """As torchrun and srun start them; one is killed, and what it leaves is done by the other, or by the next run."""

    def start(rank: int) -> subprocess.Popen[bytes]:
        launched = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "diffzoo", *arguments(run, tmp_path)]
        return subprocess.Popen(command, env={**os.environ, **launched}, stdout=subprocess.PIPE)

    ranks = [start(0), start(1)]
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("blocks/*/*.features.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks[killed].kill()
    ranks[killed].wait()
    printed, _ = ranks[1 - killed].communicate(timeout=200)
    assert ranks[1 - killed].returncode == 0
    there = len(list(tmp_path.glob("blocks/*/*.features.safetensors")))
    assert there == N // BLOCK
    if killed == 0:
        assert b"frechet" not in printed
        assert not list(tmp_path.glob("demo*.json"))
        assert start(0).wait() == 0
    assert numbers(tmp_path) == by_one


def test_ranks_share_the_blocks_and_then_help_from_the_end() -> None:
    spans = [(i, 10 * i, 10) for i in range(5)]
    first, second = (_in_turn(spans, Launch(rank, 2)) for rank in range(2))
    assert [s[0] for s in first] == [0, 2, 4, 3, 1]
    assert [s[0] for s in second] == [1, 3, 4, 2, 0]
    assert _in_turn(spans, Launch()) == spans
    assert launch({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}) == Launch(3, 8, 1)
    assert launch({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "LOCAL_RANK": "0"}) == Launch(2, 4, 0)


def test_other_weights_other_numbers(run: Path, by_one: dict[str, Any], tmp_path: Path) -> None:
    assert main([*arguments(run, tmp_path), "--weights", "raw"]) == 0
    raw = numbers(tmp_path)
    assert raw["plan"]["weights_sha256"] != by_one["plan"]["weights_sha256"]
    assert raw["values"] != by_one["values"]


def test_the_plan_of_a_sweep_over_emas_is_written_back_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--protocol", "demo", "--n", "140", "--steps", "2", "--quiet", "--device", "cpu"]
    options = ["--scales", "1", "2", "--weights", "raw", "ema_0.9", "--first-part", "1", "--out", str(tmp_path / "s")]
    missing = ["--weights", "raw", "0.99", "--out", str(tmp_path / "no")]
    assert main(["sweep", "guidance", str(run), *shared, *missing]) == 2
    assert "no EMA '0.99'" in capsys.readouterr().err
    assert main(["sweep", "guidance", str(run), *shared, *options]) == 0
    table = (tmp_path / "s" / "sweep.txt").read_text().splitlines()
    assert len(table) == 5
    chosen = json.loads((tmp_path / "s" / "plan.json").read_text())
    assert chosen["weights"] in table[1]
    assert chosen["weights_sha256"]
    # the command that the sweep prints gives the number in its first row
    command = next(line for line in capsys.readouterr().out.splitlines() if "diffzoo eval" in line)
    words = command[command.index("diffzoo eval") :].split()[1:]
    assert main([*words, "--quiet", "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
    value = numbers(tmp_path / "again")["values"]["frechet:random-conv"]["value"]
    assert f"{value:.5g}" in table[1]


def test_a_sweep_over_averaging_lengths(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--protocol", "demo", "--n", "140", "--steps", "2", "--quiet", "--device", "cpu", "--out", str(tmp_path)]
    options = ["--scales", "1", "--stds", "0.07", "0.2", "--weights", "raw", "--first-part", "1"]
    assert main(["sweep", "guidance", str(run), *shared, *options]) == 0
    table = (tmp_path / "sweep.txt").read_text()
    assert all(name in table for name in ("raw", "power_0.070_00000040", "power_0.200_00000040"))
    values = [float(line.split("140")[1].split()[0]) for line in table.splitlines()[1:]]
    assert values == sorted(values)
    assert len(set(values)) == 3
    chosen = json.loads((tmp_path / "plan.json").read_text())
    assert chosen["model"] in capsys.readouterr().out
    assert Path(chosen["model"]).stem in table.splitlines()[1] or chosen["weights"] == "raw"
