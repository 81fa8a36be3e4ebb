"""Running a study: every arm with every seed as an ordinary `diffzoo fit` and `diffzoo eval`, in its own process.

    OUT/ARM/seed-S/run/        the run, as `fit` leaves it
    OUT/ARM/seed-S/eval/       its evaluation
    OUT/ARM/seed-S/done.json   what was measured; written last
    OUT/ARM/seed-S/failed.txt  why a run ended, where it did

A run that has a `done.json` for the same settings is not repeated. Several invocations of the same command share the
work: each takes runs that no other holds. So `--processes`, the members of a SLURM array and the ranks of torchrun need
no scheduler, and a killed process costs only what it had not saved.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TextIO

from filelock import Timeout

from diffzoo.cache import lock
from diffzoo.errors import UserError
from diffzoo.files import write_text
from diffzoo.report import read_run
from diffzoo.runs import without_launcher
from diffzoo.study.spec import Evaluate, Study, options

__all__ = ["Children", "Job", "Measured", "eval_arguments", "jobs_of", "measured", "run_jobs", "set_aside"]

LAST = 0.2  # share of a run over which its loss per noise level is averaged
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Args:
        arm: its label.
        seed: of the run.
        folder: of its files.
        arguments: of `diffzoo fit` but the run's directory.
        steps: optimizer steps.
        evaluate: how the finished run is evaluated.
    """

    arm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    steps: int
    evaluate: Evaluate | None

    @property
    def settings(self) -> str:
        """What its result depends on, as one line of text."""
        evaluate = self.evaluate and [self.evaluate.protocol, self.evaluate.n, sorted(self.evaluate.options.items())]
        return json.dumps([self.arguments, self.steps, self.seed, evaluate])

    def changes(self, before: str) -> tuple[bool, bool]:
        """Whether its training, and whether its evaluation, differs from that of earlier settings.

        A recipe that ships is the same one in another checkout.
        """
        (*train, evaluate), (*train_before, evaluate_before) = json.loads(self.settings), json.loads(before)
        for arguments, *_ in (train, train_before):
            arguments[1] = re.sub(r".*/recipes/", "", arguments[1])  # of -c
        return train != train_before, evaluate != evaluate_before


@dataclass(frozen=True)
class Measured:
    """What a run gave, by the names of the table's columns; or why it gave nothing.

    Args:
        values: what the settings and the seed decide.
        speed: what the machine decides: images per second, memory.
        failure: the last line of a run that ended early.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    speed: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def columns(self) -> dict[str, float]:
        """All that is measured."""
        return {**self.values, **self.speed}


def jobs_of(
    study: Study, base: str, steps: Mapping[str, int], settings: Mapping[str, Mapping[str, object]], out: Path
) -> list[Job]:
    """All runs of a study, seed by seed, so that every arm has its first seed early.

    `base` is the path of its recipe; `steps` and `settings` of `diffzoo fit` are those of each arm.
    """
    arguments = {arm: ("-c", base, *options(settings[arm])) for arm in study.arms}
    folders = {arm: out / re.sub(r"[^\w.-]+", "-", arm) for arm in study.arms}
    return [
        Job(arm, seed, folders[arm] / f"seed-{seed}", arguments[arm], steps[arm], study.evaluate)
        for seed in study.seeds
        for arm in study.arms
    ]


def measured(job: Job) -> Measured | None:
    """The result of a run for these settings; None if it is not finished."""
    done, failed = job.folder / "done.json", job.folder / "failed.txt"
    if done.is_file():
        held = json.loads(done.read_text(encoding="utf-8"))
        return None if any(job.changes(held["settings"])) else Measured(held["values"], held["speed"])
    return Measured(failure=failed.read_text(encoding="utf-8")) if failed.is_file() else None


def run_jobs(jobs: Sequence[Job], processes: int, say: Say) -> None:
    """Run what is not finished, `processes` at a time.

    Runs that another invocation holds come after the others, until they are finished or their holder has died. Runs
    that failed earlier are tried again. An interruption ends the children too; their checkpoints stay.
    """
    children = Children()
    for job in jobs:
        (job.folder / "failed.txt").unlink(missing_ok=True)
    pool = ThreadPoolExecutor(processes)
    try:
        while jobs:
            futures = [(job, pool.submit(_run, job, processes, children, say)) for job in jobs]
            jobs = [job for job, future in futures if not future.result()]
    finally:  # what has not begun does not begin; nothing is left of either when nothing was interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        children.end()


class Children:
    """The processes that a study has started; none starts after their end."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = threading.Lock()

    @contextmanager
    def start(
        self, command: Sequence[str], log: TextIO, environment: Mapping[str, str]
    ) -> Iterator[subprocess.Popen[str]]:
        """A process for the length of a block, which waits for it.

        Raises:
            CancelledError: after the end.
        """
        with self._lock:
            if self._ended:
                raise CancelledError
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True, env=environment)
            self._running.add(process)
        with process:
            yield process
        self._running.discard(process)

    def end(self) -> None:
        """Tell those that are running to stop, as they do with a checkpoint."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def _run(job: Job, processes: int, children: Children, say: Say) -> bool:
    """One run, unless it is finished; False if another invocation holds it."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(job.folder / "held", timeout=1.0))
        except Timeout:
            return False
        if measured(job) is not None:
            return True
        set_aside(job)
        say(f"{job.arm}, seed {job.seed}: {job.steps} steps")
        start = time.monotonic()
        run = ["--run", str(job.folder / "run"), "--resume", "auto"]
        seed = [f"--seed_everything={job.seed}", f"--model.seed={job.seed}"]
        failure = _child(["fit", *job.arguments, *run, *seed], job, processes, children)
        if not failure and job.evaluate is not None:
            failure = _child(["eval", *eval_arguments(job, job.evaluate)], job, processes, children)
        if failure:
            write_text(job.folder / "failed.txt", failure)
            say(f"{job.arm}, seed {job.seed}: {failure}")
            return True
        values, speed = _values(job)
        done = {"settings": job.settings, "values": values, "speed": speed}
        write_text(job.folder / "done.json", json.dumps(done, indent=1))
        say(f"{job.arm}, seed {job.seed}: done in {(time.monotonic() - start) / 60:.1f} min")
        return True


def set_aside(job: Job) -> None:
    """Set aside what other settings gave: resuming would mix the two. If only the evaluation differs, the run stays."""
    told = job.folder / "settings.json"
    train, evaluation = job.changes(told.read_text(encoding="utf-8")) if told.is_file() else (False, False)
    if train or evaluation:
        aside = job.folder / f"before-{int(time.time())}"
        aside.mkdir()
        for name in ("eval.json", "eval", "done.json", *(("run", "log.txt") if train else ())):
            with suppress(FileNotFoundError):
                (job.folder / name).rename(aside / name)
    write_text(told, job.settings)


def eval_arguments(job: Job, evaluate: Evaluate) -> list[str]:
    """Arguments of `diffzoo eval` for a finished run."""
    given = {**({} if evaluate.n is None else {"n": evaluate.n}), **evaluate.options}
    more = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [str(job.folder / "run"), "--protocol", evaluate.protocol, "--out", str(job.folder / "eval"), *more]


def _child(arguments: Sequence[str], job: Job, processes: int, children: Children) -> str:
    """Run `diffzoo ARGUMENTS` with its output in the job's log; returns why it failed, or nothing."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **without_launcher()}
    command = [sys.executable, "-m", "diffzoo", *arguments]
    with (
        open(job.folder / "log.txt", "a", encoding="utf-8") as log,
        children.start(command, log, environment) as process,
    ):
        assert process.stderr is not None
        last = ""
        for line in process.stderr:
            log.write(line)
            last = line.strip() or last
        code = process.wait()
    return "" if code == 0 else f"`diffzoo {arguments[0]}` ended with status {code}: {last.removeprefix('diffzoo: ')}"


def _values(job: Job) -> tuple[dict[str, float], dict[str, float]]:
    """The columns of the table: losses of the run with metrics of its evaluation, and its speed."""
    columns = read_run(job.folder / "run").columns
    values, speed = dict[str, float](), dict[str, float]()
    if "val/loss" in columns:
        values["held-out loss"] = columns["val/loss"][-1][1]
    for column, points in columns.items():
        late = [value for step, value in points if step > (1 - LAST) * job.steps]
        if late and column.startswith("train/loss"):
            values[column.removeprefix("train/").replace("_", " ")] = mean(late)
        elif late and column in ("speed/images_per_second", "speed/memory_gib"):
            speed[column.removeprefix("speed/").replace("_", " ")] = median(late)
    if job.evaluate is not None:
        values |= _evaluated(job.folder / "eval")
    return values, speed


def _evaluated(folder: Path) -> dict[str, float]:
    for path in sorted(folder.rglob("*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(held, dict) and "values" in held and "protocol" in held:
            return {name: float(value["value"]) for name, value in held["values"].items()}
    raise UserError(f"{folder} holds no result of an evaluation")
