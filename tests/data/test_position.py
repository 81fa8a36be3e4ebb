"""Runs that are killed and resumed see exactly what a run sees that is not, on any number of workers and ranks."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data import run_position
from data.stand_ins import Recorder, Shards, quiet_trainer, rows, signature, uneven_shards, write_parquet
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from training.test_checkpointing import Child

from diffzoo.data.demo import DemoData
from diffzoo.errors import UserError

BATCH = run_position.SETTINGS["batch_size"]
STEPS = 45  # of 8 in 150 rows: more than two epochs, with a batch across each border


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return uneven_shards(tmp_path_factory.mktemp("shards"))


def module(files: list[str], **settings) -> Shards:
    """Read by row group in lanes that are much smaller than an epoch."""
    return Shards(files, **{**run_position.SETTINGS, "num_workers": 0, **settings})


def walk(data: Shards, steps: int) -> list[tuple]:
    """What the next steps show."""
    seen: list[tuple] = []
    while True:
        for batch in data.train_dataloader():
            seen += signature(batch)
            steps -= 1
            if not steps:
                return seen


@pytest.fixture(scope="module")
def unbroken(files: list[str]) -> list[tuple]:
    return walk(module(files), STEPS)


def test_the_stream_is_complete_and_never_short(files: list[str], unbroken: list[tuple]) -> None:
    assert [s[0] for s in unbroken] == list(range(STEPS * BATCH))
    for epoch in range(2):
        assert sorted(s[1] for s in unbroken[150 * epoch : 150 * (epoch + 1)]) == list(range(150))
    by_row: dict[int, set] = {}
    for _, row, caption, pixels in unbroken:
        by_row.setdefault(row, set()).add((caption, pixels))
    assert max(map(len, by_row.values())) > 1, "crops, flips or captions change between visits"


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_it(files: list[str], unbroken: list[tuple], workers: int) -> None:
    data = module(files, num_workers=workers)
    assert walk(data, STEPS) == unbroken
    data.teardown()


@pytest.mark.parametrize(
    ("stops", "by_block"),
    [((1, 1), True), ((5, 3), False), ((18, 1), True), ((19, 1), False), ((20, 17), True), ((2, 37), True)],
)
def test_two_resumes(files: list[str], stops: tuple[int, int], by_block: bool) -> None:
    """Each leg with another number of workers; the state passes through JSON-like values only."""
    whole = walk(module(files, by_block=by_block), STEPS)
    seen: list[tuple] = []
    state = None
    for steps, workers in zip((*stops, STEPS - sum(stops)), (0, 2, 1), strict=True):
        data = module(files, by_block=by_block, num_workers=workers)
        if state is not None:
            data.load_state_dict(json.loads(state))
        seen += walk(data, steps)
        state = json.dumps(data.state_dict())
        data.teardown()
    assert seen == whole


def test_another_batch_size_after_a_resume_loses_nothing(files: list[str], unbroken: list[tuple]) -> None:
    first = module(files)
    seen = walk(first, 5)
    second = module(files, batch_size=20)
    second.load_state_dict(first.state_dict())
    assert seen + walk(second, 16) == unbroken


def test_ranks_share_each_global_batch(files: list[str], unbroken: list[tuple], monkeypatch) -> None:
    parts, world = [], 4
    for rank in range(world):
        data = module(files, num_workers=rank % 3)
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, world))
        parts.append(walk(data, STEPS))
        data.teardown()
    mine = BATCH // world
    joined = [s for step in range(STEPS) for part in parts for s in part[step * mine : (step + 1) * mine]]
    assert joined == unbroken


@pytest.mark.parametrize("workers", [0, 3])
def test_micro_batches_do_not_change_it(files: list[str], unbroken: list[tuple], workers: int) -> None:
    data = module(files, num_workers=workers, micro_batch_size=2)
    assert len(data.train_dataloader()) == 4 * module(files).steps_per_epoch
    seen = walk(data, 4 * 7 + 3)  # three of the four micro-batches of a step: its gradient is lost with the run
    data.teardown()
    assert seen == unbroken[: 7 * BATCH + 6]
    assert data.images_seen == 7 * BATCH
    resumed = module(files, micro_batch_size=4)
    resumed.load_state_dict(data.state_dict())
    assert walk(resumed, 2 * (STEPS - 7)) == unbroken[7 * BATCH :]


def test_micro_batches_are_shared_among_ranks(files: list[str], unbroken: list[tuple], monkeypatch) -> None:
    parts = []
    for rank in range(2):
        data = module(files, micro_batch_size=2)
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, 2))
        assert data.accumulate == 2
        parts.append(walk(data, 2 * STEPS))
    mine = BATCH // 2
    assert [s for step in range(STEPS) for part in parts for s in part[step * mine : (step + 1) * mine]] == unbroken


def test_a_micro_batch_that_does_not_divide_names_those_that_do(files: list[str]) -> None:
    with pytest.raises(UserError, match="set micro_batch_size to 2 or 4"):
        module(files, micro_batch_size=3).train_dataloader()
    assert module(files, micro_batch_size=64).accumulate == 1


def run_leg(files: list[str], folder: Path, ckpt: Path | None, stop_at: int | None, **settings) -> Recorder:
    """One life of a run under Lightning: killed at step `stop_at`, resumed from `ckpt`."""
    recorder = Recorder(stop_at)
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False)
    trainer = quiet_trainer(folder, max_steps=STEPS, callbacks=[saver], enable_checkpointing=True)
    data = module(files, **settings)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder


@pytest.mark.parametrize("stops", [(1, 2), (18, 19), (20, 38)])
def test_lightning_resume(files: list[str], unbroken: list[tuple], stops: tuple[int, int], tmp_path: Path) -> None:
    """19 steps are an epoch: kills inside one, at its border, and twice in a row."""
    seen: list[tuple] = []
    ckpt = None
    for leg, stop_at in enumerate((*stops, None)):
        seen += run_leg(files, tmp_path, ckpt, stop_at, num_workers=(0, 2, 1)[leg]).seen
        ckpt = tmp_path / "last.ckpt"
    assert seen == unbroken
    saved = torch.load(ckpt, weights_only=True)
    assert saved["Shards"]["images_seen"] == STEPS * BATCH


def test_an_interrupted_step_is_repeated(files: list[str], unbroken: list[tuple], tmp_path: Path) -> None:
    """A checkpoint written while a step is under way counts the batch of this step as unseen."""
    data = module(files)
    saved = {}

    class Saver(Callback):
        def on_exception(self, trainer, module, exception):
            saved.update(data.state_dict())

    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[Saver()])
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(Recorder(stop_at=6), datamodule=data)
    assert saved["images_seen"] == data.images_seen == 6 * BATCH
    again = module(files)
    again.load_state_dict(saved)
    assert walk(again, 3) == unbroken[6 * BATCH : 9 * BATCH]


def test_position_outside_a_trainer(files: list[str], unbroken: list[tuple]) -> None:
    data = module(files)
    data.set_position(17 * BATCH)
    assert walk(data, 4) == unbroken[17 * BATCH : 21 * BATCH]
    assert data.images_seen == 21 * BATCH
    with pytest.raises(UserError, match="at least 0"):
        data.set_position(-1)


def test_a_changed_source_is_refused(files: list[str], tmp_path: Path) -> None:
    state = module(files).state_dict()
    other = module(uneven_shards(tmp_path)[:3])
    with pytest.raises(UserError, match="no longer what the checkpoint was trained on"):
        other.load_state_dict(state)
    forced = module(uneven_shards(tmp_path)[:3], allow_changed_source=True)
    forced.load_state_dict(state)


def test_balanced_demo_resumes() -> None:
    whole = DemoData(image_size=32, batch_size=16)
    expected = walk(whole, 12)
    first = DemoData(image_size=32, batch_size=16)
    seen = walk(first, 5)
    second = DemoData(image_size=32, batch_size=16, num_workers=2)
    second.load_state_dict(first.state_dict())
    assert seen + walk(second, 7) == expected
    second.teardown()


@pytest.mark.filterwarnings("ignore:.*keep the seed 0 of the checkpoint")
@pytest.mark.parametrize("balance", [False, True])
def test_the_seed_of_the_checkpoint_is_kept(files: list[str], balance: bool) -> None:
    """Order, crops, flips and captions."""
    settings = {"by_block": False, "balance": balance}
    whole = walk(module(files, **settings), 24)
    first = module(files, **settings)
    seen = walk(first, 10)
    second = module(files, seed=5, **settings)
    with pytest.warns(UserWarning, match="the order, crops and flips of the data keep the seed 0 of the checkpoint"):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert seen + walk(second, 7) == whole[: 17 * BATCH]
    third = module(files, seed=6, **settings)
    third.load_state_dict(second.state_dict())  # whose seed is that of the first
    assert walk(third, 7) == whole[17 * BATCH :]


@pytest.mark.parametrize("balance", [False, True])
def test_another_kind_of_order_is_refused(files: list[str], balance: bool) -> None:
    state = module(files, by_block=False, balance=balance).state_dict()
    was, now = (str(b).lower() for b in (balance, not balance))
    with pytest.raises(
        UserError, match=f"trained with balance set to {was}, .* with balance set to {now}: set it back"
    ):
        module(files, by_block=False, balance=not balance).load_state_dict(state)


def test_a_streamed_run_goes_on_where_the_rows_have_been_fetched(files: list[str], unbroken: list[tuple]) -> None:
    first = module(files)
    seen = walk(first, 11)
    second = module(files, by_block=False)
    second.load_state_dict(first.state_dict())
    assert seen + walk(second, STEPS - 11) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_killed_twice_is_as_never_killed(files: list[str], unbroken: list[tuple], workers: int, tmp_path: Path) -> None:
    """SIGKILL after random delays, twice in a row. Every step of every life shows the rows, captions and pixels that
    a run shows which is left alone; none is left out."""
    delays = np.random.default_rng([11, workers]).uniform(0.2, 0.8, 2)
    arguments = {"run": tmp_path, "files": files, "steps": STEPS, "workers": workers, "sleep": 0.04}
    shown: dict[int, list] = {}
    for life, delay in enumerate((*delays, None)):
        child = Child(tmp_path / f"log{life}", run_position.train, **arguments)
        if delay is None:
            assert child.finish() == 0, child.log.read_text()
        else:
            child.wait_for("step ")
            time.sleep(delay)
            child.send(signal.SIGKILL)
            assert child.finish() == -signal.SIGKILL
        text = child.log.read_text()
        steps = re.findall(r"^step (\d+) (\[.*\])$", text, re.MULTILINE)
        numbers = [int(number) for number, _ in steps]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] <= len(shown)
        for number, samples in steps:
            samples = json.loads(samples)
            assert shown.setdefault(int(number), samples) == samples
    assert [tuple(s) for step in range(STEPS) for s in shown[step]] == unbroken


def two_processes(folder: Path, **arguments) -> list[dict]:
    """What two gloo ranks report."""
    folder.mkdir()
    command = [sys.executable, run_position.__file__, json.dumps({"out": str(folder), **arguments})]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, timeout=250, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_then_one(files: list[str], unbroken: list[tuple], workers: int, tmp_path: Path) -> None:
    """Two gloo ranks, stopped and resumed on two, then resumed on one: global batches as in an unbroken run."""
    seen: list[tuple] = []
    ckpt, done = None, 0
    for steps in (13, 30):
        out = tmp_path / str(steps)
        ranks = [r["seen"] for r in two_processes(out, files=files, ckpt=ckpt, steps=steps, workers=workers)]
        mine = BATCH // 2
        assert [len(part) for part in ranks] == [mine * (steps - done)] * 2
        for step, part in itertools.product(range(steps - done), ranks):
            seen += [tuple(s) for s in part[step * mine : (step + 1) * mine]]
        ckpt, done = str(out / "last.ckpt"), steps
    seen += run_leg(files, tmp_path / "one", Path(ckpt), None, num_workers=workers).seen
    assert seen == unbroken


@pytest.mark.slow
def test_ranks_tell_each_other_of_bad_images(tmp_path: Path) -> None:
    """When a pass begins each knows of all that were met before, and so does the checkpoint."""
    some = rows(0, 40)
    bad = (3, 11, 12, 30)
    for row in bad:
        some[row]["image"] = None
    write_parquet(tmp_path / "x.parquet", some, 8)
    ranks = two_processes(
        tmp_path / "out", files=[str(tmp_path / "x.parquet")], ckpt=None, steps=11, workers=0
    )  # of five steps per pass
    met = [set(r["bad"][4]) for r in ranks]
    assert met[0] - met[1], "the first has met others than the second"
    assert met[1] - met[0], "and the second others than the first"
    for rank in ranks:
        assert set(rank["bad"][5]) >= met[0] | met[1]
    saved = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert set(saved["Shards"]["bad_images"]) == set(bad)
