"""Checkpoints: what a kill, a damaged file, a full disk, a signal and a second process leave behind."""

import hashlib
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from diffzoo.errors import UserError
from diffzoo.runs import RunLock, checksum_file, find_resume, is_first_process, is_sound, list_checkpoints
from diffzoo.training import checkpoint_files, checkpoint_io, stop_signals
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.ema import CHECKPOINT_KEY

sys.path.insert(0, str(Path(__file__).parent))
import run_checkpointing

pytestmark = [pytest.mark.filterwarnings("ignore")]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "lightning.pytorch", "diffzoo.training.checkpointing"])


class Child:
    """A training run in its own process, whose lines can be waited for.

    It is forked from a server without threads: a fork of the test process hangs on locks that other threads hold.
    """

    def __init__(self, log: Path, target: Callable = run_checkpointing.train, **arguments) -> None:
        self.log = log
        self.process = SERVER.Process(target=run_checkpointing.child, args=(log, target, arguments), daemon=True)
        self.process.start()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in (self.log.read_text() if self.log.exists() else ""):
            if time.monotonic() > end or not self.process.is_alive():
                self.process.kill()
                raise AssertionError(self.log.read_text())
            time.sleep(0.005)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, seconds: float = 60) -> int:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running: {self.log.read_text()}")
        return self.process.exitcode


def losses(*logs: Path) -> dict[int, str]:
    """The loss of every step; a step that was repeated after a kill must have had the same loss before."""
    found: dict[int, str] = {}
    for log in logs:
        parts: dict[int, str] = {}
        for step, value in re.findall(r"^step (\d+) (\S+)$", log.read_text(), re.MULTILINE):
            parts[int(step)] = parts.get(int(step), "") + value  # of all micro-batches
        for step, value in parts.items():
            known = found.get(step, "")  # the step in which it was killed may be half done
            assert value.startswith(known) or known.startswith(value), f"step {step} differs after a resume"
            found[step] = max(known, value, key=len)
    return found


def contents(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a: Path, b: Path) -> None:
    """Weights, EMAs, optimizer and counters of two checkpoints are bit-identical."""
    first, second = contents(a), contents(b)
    for part in ("state_dict", "optimizer_states", CHECKPOINT_KEY, "global_step", "epoch", "loops", "lr_schedulers"):
        left, right = (torch.utils._pytree.tree_flatten(c[part]) for c in (first, second))
        assert left[1] == right[1], part
        for x, y in zip(left[0], right[0], strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, part


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole")
    assert Child(run / "log", run=run, steps=20).finish() == 0
    return run


# -- what is written


def test_files_of_a_run(whole: Path) -> None:
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    steps = (15, 18, 20)
    assert names == sorted([f"step_{s:08d}.ckpt" for s in steps] + [f"step_{s:08d}.ckpt.sha256" for s in steps])
    assert [p.name for p in list_checkpoints(whole)] == [f"step_{s:08d}.ckpt" for s in reversed(steps)]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_checksums_are_those_of_sha256sum(whole: Path) -> None:
    names = [p.name for p in (whole / "checkpoints").glob("*.sha256")]
    assert (
        subprocess.run(["sha256sum", "-c", *names], cwd=whole / "checkpoints", stdout=subprocess.DEVNULL).returncode
        == 0
    )


def test_rotation_keeps_permanent_ones(tmp_path: Path) -> None:
    callback = Checkpointing(every_n_steps=2, keep=1, keep_every_n_steps=4)
    assert Child(tmp_path / "log", run_checkpointing.train_with, run=tmp_path, callback=callback).finish() == 0
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step_{s:08d}.ckpt" for s in (10, 8, 4)]


@pytest.mark.parametrize("settings", [{"keep": 0}, {"every_n_steps": -1}, {"every_minutes": -1.0}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(UserError):
        Checkpointing(**settings)


# -- kills


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_three_times_is_as_never_killed(tmp_path: Path, whole: Path, accumulate: int) -> None:
    """SIGKILL at three points; weights, EMAs, optimizer, losses and data are those of the undisturbed run."""
    if accumulate > 1:
        whole = tmp_path / "whole"
        whole.mkdir()
        assert Child(whole / "log", run=whole, steps=20, accumulate=2).finish() == 0
    run, logs = tmp_path / "run", []
    run.mkdir()
    for n, step in enumerate((5, 9, 17)):
        child = Child(run / f"log{n}", run=run, steps=20, accumulate=accumulate, sleep=0.01)
        logs.append(child.log)
        child.wait_for(f"step {step} ")
        child.send(signal.SIGKILL)
        assert child.finish() == -signal.SIGKILL
    last = Child(run / "last", run=run, steps=20, accumulate=accumulate)
    assert last.finish() == 0
    assert losses(*logs, last.log) == losses(whole / "log")
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])


@pytest.mark.parametrize("at_write", [pytest.param(n, marks=[pytest.mark.slow] * (n != 20)) for n in (1, 20, 60)])
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, whole: Path, at_write: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    killed = Child(run / "first", run_checkpointing.killed_while_writing, run=run, steps=20, at_write=at_write)
    assert killed.finish() == -signal.SIGKILL
    assert list((run / "checkpoints").glob(".step_*.part"))  # it did die in the middle
    assert find_resume(run, pytest.fail).name == "step_00000003.ckpt"
    resumed = Child(run / "second", run=run, steps=20)
    assert resumed.finish() == 0
    assert not list((run / "checkpoints").glob(".step_*"))
    assert losses(killed.log, resumed.log) == losses(whole / "log")
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])


@pytest.mark.parametrize(
    "stage",
    [
        "before the rename",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("before the checksum", "before rotation")),
    ],
)
def test_killed_between_the_writes(tmp_path: Path, whole: Path, stage: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    killed = Child(run / "first", run_checkpointing.killed_between_writes, run=run, steps=20, stage=stage)
    assert killed.finish() == -signal.SIGKILL
    sound = find_resume(run, pytest.fail)
    assert sound.name == ("step_00000006.ckpt" if stage == "before rotation" else "step_00000003.ckpt")
    resumed = Child(run / "second", run=run, steps=20)
    assert resumed.finish() == 0
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])


# -- damage


def damaged_copy(whole: Path, tmp_path: Path, damage: str) -> Path:
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    newest = list_checkpoints(run)[0]
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    elif damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    newest.write_bytes(data)
    if damage == "no checksum and truncated":
        newest.write_bytes(data[:-100])
        checksum_file(newest).unlink()
    return run


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "no checksum and truncated"])
def test_damaged_newest_is_reported_and_passed_over(whole: Path, tmp_path: Path, damage: str) -> None:
    run, told = damaged_copy(whole, tmp_path, damage), []
    assert find_resume(run, told.append).name == "step_00000018.ckpt"
    assert len(told) == 1
    assert "step_00000020.ckpt is damaged" in told[0]


def test_run_goes_on_past_a_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = damaged_copy(whole, tmp_path, "one bit")
    resumed = Child(run / "log", run=run, steps=20)
    assert resumed.finish() == 0
    assert "step_00000020.ckpt is damaged" in resumed.log.read_text()
    assert is_sound(list_checkpoints(run)[0])
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])


def test_no_checkpoint_and_none_sound(whole: Path, tmp_path: Path) -> None:
    assert find_resume(tmp_path) is None
    run = damaged_copy(whole, tmp_path, "truncated")
    for path in list_checkpoints(run):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="all 3 checkpoints"):
        find_resume(run, lambda _: None)


def test_without_checksum_but_intact_is_sound(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_00000020.ckpt"
    shutil.copy(list_checkpoints(whole)[0], copy)
    assert is_sound(copy)


def test_checkpoints_of_another_course_are_set_aside(whole: Path, tmp_path: Path) -> None:
    """Resumed by hand from an older one: the later ones must not be the newest any more, nor be lost."""
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    files = checkpoint_files.CheckpointFiles(keep=3, keep_every_n_steps=0)
    files._rotate(run / "checkpoints" / "step_00000016.ckpt")
    assert [p.name for p in list_checkpoints(run)] == ["step_00000015.ckpt"]
    assert is_sound(run / "checkpoints" / "stale" / "step_00000020.ckpt")


@pytest.mark.parametrize("way", ["on a device", "on the host", "elsewhere"])
def test_what_is_written_is_the_state_when_training_saved(tmp_path: Path, monkeypatch, way: str) -> None:
    """The weights change while they are written; what is saved stays one moment, and shared memory stays shared."""
    writing, go_on = multiprocessing.Event(), multiprocessing.Event()
    write = checkpoint_io._HashingFile.write

    def slow_write(self, data) -> int:
        writing.set()
        assert way == "elsewhere" or go_on.wait(20)
        return write(self, data)

    monkeypatch.setattr(checkpoint_io._HashingFile, "write", slow_write)
    monkeypatch.setattr(checkpoint_io, "tree_any", lambda *_: way == "on a device")
    monkeypatch.setattr(checkpoint_io.sys, "platform", "win32" if way == "elsewhere" else "linux")
    weight = torch.arange(6.0)
    path, io = tmp_path / "folder" / "a.ckpt", checkpoint_io.BackgroundCheckpointIO()
    io.save_checkpoint({"state": {"w": weight, "tied": weight, "row": weight[2:4]}, "steps": [7]}, path)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(io.finish)
        assert writing.wait(20)
        weight.zero_()
        go_on.set()
        assert digest.result() == hashlib.sha256(path.read_bytes()).hexdigest()
    held = torch.load(path)
    assert held["steps"] == [7]
    assert held["state"]["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert held["state"]["row"].tolist() == [2, 3]
    assert held["state"]["w"].data_ptr() == held["state"]["tied"].data_ptr()


@pytest.mark.parametrize("patience", [20.0, 0.1])
def test_the_next_optimizer_step_waits_for_the_file_but_not_for_long(tmp_path: Path, monkeypatch, patience) -> None:
    """It would change the memory that the forked child writes, so that the system had to hold it twice."""
    write, seen = checkpoint_io._HashingFile.write, []

    def slow(self, data) -> int:
        time.sleep(0.02)
        return write(self, data)

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 4:  # the optimizer step after the checkpoint of step 3 has been taken
                seen.append(checksum_file(tmp_path / "checkpoints" / "step_00000003.ckpt").exists())

    monkeypatch.setattr(checkpoint_io._HashingFile, "write", slow)
    monkeypatch.setattr(checkpoint_files, "PATIENCE", patience)
    run_checkpointing.train(tmp_path, 4, callbacks=[Looks()])
    assert seen == [patience > 1]


def test_a_state_that_cannot_be_pickled_is_an_error_of_the_run(tmp_path: Path) -> None:
    class Unpicklable(L.Callback):
        def state_dict(self):
            return {"function": lambda: None}

    with pytest.raises(Exception, match=r"(?i)pickle|lambda"):
        run_checkpointing.train(tmp_path, 4, callbacks=[Unpicklable()])


def test_a_killed_writer_costs_its_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may kill the child, for example when memory is short."""
    write, warned = checkpoint_io._HashingFile.write, []

    def deadly(self, data) -> int:
        if "step_00000003" in self._file.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    monkeypatch.setattr(checkpoint_io._HashingFile, "write", deadly)
    monkeypatch.setattr(checkpoint_files, "rank_zero_warn", warned.append)
    run_checkpointing.train(tmp_path, 6)
    assert len(warned) == 1
    assert "step 3 could not be written" in warned[0]
    assert "was killed" in warned[0]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000006.ckpt"]


# -- disk


def test_full_disk_keeps_the_old_checkpoint_and_goes_on(tmp_path: Path, whole: Path) -> None:
    child = Child(tmp_path / "log", run_checkpointing.full_disk, run=tmp_path, steps=20)
    assert child.finish() == 0
    warned = re.findall("^warned: (.*)", child.log.read_text(), re.MULTILINE)
    assert len(warned) == 2
    assert "step 6 could not be written" in warned[0]
    assert "No space left on device" in warned[0]
    assert "the newest is step_00000003.ckpt" in warned[0]
    assert list_checkpoints(tmp_path)[0].name == "step_00000020.ckpt"
    assert not list((tmp_path / "checkpoints").glob(".step_*"))
    assert_same(list_checkpoints(tmp_path)[0], list_checkpoints(whole)[0])


@pytest.mark.slow
def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file-size limit of the system, in place of a disk that cannot be made full without privileges."""
    child = Child(tmp_path / "log", run_checkpointing.with_limited_files, run=tmp_path, steps=4)
    assert child.finish() == 0
    assert "File too large" in child.log.read_text()
    assert list_checkpoints(tmp_path) == []


# -- signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_signal_saves_and_leaves(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    run.mkdir()
    child = Child(run / "log", run=run, steps=20, every=100, sleep=0.05)
    child.wait_for("step 7 ")
    child.send(number)
    assert child.finish() == 128 + number
    step = max(losses(child.log)) + 1
    assert [p.name for p in list_checkpoints(run)] == [f"step_{step:08d}.ckpt"]
    assert f"{number.name}: stopped at step {step}" in child.log.read_text()
    resumed = Child(run / "resumed", run=run, steps=20)
    assert resumed.finish() == 0
    assert losses(child.log, resumed.log) == losses(whole / "log")
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])


@pytest.mark.slow
def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    child = Child(tmp_path / "log", run=tmp_path, steps=20, every=2, sleep=1.5)
    child.wait_for("step 2 ")
    child.send(signal.SIGINT)
    child.wait_for("again to stop at once")
    start = time.monotonic()
    child.send(signal.SIGINT)
    assert child.finish() == 1
    assert time.monotonic() - start < 1.5
    assert find_resume(tmp_path).name == "step_00000002.ckpt"


def test_signal_during_validation(tmp_path: Path) -> None:
    """500 batches of 0.2 s are cut short."""
    child = Child(tmp_path / "log", run=tmp_path, steps=20, every=100, validate=0.2)
    child.wait_for("validation")
    start = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.finish() == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000005.ckpt"]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    run_checkpointing.train(tmp_path, 2)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_slurm_puts_the_job_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    class Trainer:
        class _accelerator_connector:
            cluster_environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)

    assert stop_signals._requeues(Trainer, signal.SIGUSR2)
    assert not stop_signals._requeues(Trainer, signal.SIGTERM)
    called = []
    monkeypatch.setattr(stop_signals.subprocess, "run", lambda command, check: called.append(command))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stop_signals._requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    stop_signals._requeue()
    assert called == [["scontrol", "requeue", "17"], ["scontrol", "requeue", "16_3"]]


def test_slurm_puts_a_job_of_one_device_back(tmp_path: Path) -> None:
    """The real trainer, found by the variables of SLURM, and a `scontrol` that keeps what it is told."""
    called, folder = tmp_path / "called", tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (folder / "scontrol").chmod(0o755)
    environment = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
                   "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{folder}:{os.environ['PATH']}"}  # fmt: skip
    child = Child(
        tmp_path / "log", run_checkpointing.under_slurm, run=tmp_path, variables=environment, steps=20, every=100,
        sleep=0.05,
    )  # fmt: skip
    child.wait_for("step 3 ")
    child.send(signal.SIGUSR1)
    assert child.finish() == 128 + signal.SIGUSR1
    assert called.read_text() == "requeue 17\n"
    assert len(list_checkpoints(tmp_path)) == 1


# -- clocks


@pytest.mark.parametrize("now", [lambda n: 1e9 - 3600 * n, lambda n: 0.0], ids=["backwards", "standing"])
def test_order_does_not_depend_on_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: Callable) -> None:
    """The clock of the machine goes backwards in training, and the files' times are any: steps alone count."""
    calls = itertools.count()
    monkeypatch.setattr(time, "time", lambda: now(next(calls)))
    run_checkpointing.train(tmp_path, 9)
    names = [f"step_{s:08d}.ckpt" for s in (9, 6, 3)]
    for times in ((1, 2, 3), (3, 2, 1), (2, 2, 2)):
        for name, when in zip(names, times, strict=True):
            for path in (tmp_path / "checkpoints" / name, tmp_path / "checkpoints" / f"{name}.sha256"):
                os.utime(path, (when, when))
        assert [p.name for p in list_checkpoints(tmp_path)] == names
        assert find_resume(tmp_path, pytest.fail).name == names[0]
    run_checkpointing.train(tmp_path, 12)  # goes on, and rotates the oldest out
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000012.ckpt", *names[:2]]


def test_intervals_in_minutes_follow_no_clock_that_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 + 1e5 * (next(jumps) % 7))  # a day forward or a week back
    train = run_checkpointing.train_with
    monkeypatch.setattr(run_checkpointing, "Checkpointing", None)  # put back what `train_with` replaces
    train(tmp_path, Checkpointing(every_minutes=60), steps=4)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004.ckpt"]


# -- several processes


def test_run_directory_in_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = Child(tmp_path / "log", run_checkpointing.hold, run=run)
    child.wait_for("held")
    with pytest.raises(UserError, match=f"in use by process {child.process.pid} on"), RunLock(run):
        pass
    child.send(signal.SIGKILL)
    child.finish()
    with RunLock(run):  # freed by the system
        pass
    with RunLock(run):
        pass


def test_only_the_first_process_locks() -> None:
    first = is_first_process
    assert first({})
    assert first({"RANK": "0", "LOCAL_RANK": "0"})
    assert not first({"RANK": "8", "LOCAL_RANK": "0"})
    assert not first({"LOCAL_RANK": "1"})
    assert not first({"NODE_RANK": "1"})
    assert not first({"SLURM_PROCID": "3"})


def start_two(run: Path, log: Path, *options: str) -> subprocess.Popen:
    script = Path(run_checkpointing.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), str(run), "20", "--devices", "2", *options],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes(tmp_path: Path, number: signal.Signals) -> None:
    """The first process of two gets the signal; resumed, the run is as one that was left alone."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start_two(whole, tmp_path / "log").wait(240) == 0
    log = tmp_path / "first"
    process = start_two(run, log, "--sleep", "0.3")
    end = time.monotonic() + 240
    while "step 7 " not in log.read_text():
        assert time.monotonic() < end
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(240) == (143 if number == signal.SIGTERM else -9)
    time.sleep(1)
    assert start_two(run, tmp_path / "second").wait(240) == 0
    assert_same(list_checkpoints(run)[0], list_checkpoints(whole)[0])
