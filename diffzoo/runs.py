"""The folder of a run: what lies where in it, its newest sound checkpoint, and the lock that one process holds.

    config.yaml  metrics.csv  starts.jsonl  report.html  tensorboard/  samples/  checkpoints/  averages/  adapter/

Beside `checkpoints/step_00001000.ckpt` lies `step_00001000.ckpt.sha256`, in the form of `sha256sum`. A checkpoint
without a matching checksum is damaged.
"""

import os
import re
import socket
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, NamedTuple

from diffzoo.errors import UserError
from diffzoo.files import sha256

__all__ = [
    "Launch",
    "Run",
    "RunLock",
    "checksum_file",
    "checksum_lines",
    "find_resume",
    "free_directory",
    "is_first_process",
    "is_sound",
    "launch",
    "list_checkpoints",
    "newest_checkpoint",
    "run_of",
    "step_of",
    "without_launcher",
]


@dataclass(frozen=True)
class Run:
    """Places in the folder of a run, whether they exist or not."""

    root: Path

    @property
    def config(self) -> Path:
        """The whole recipe, defaults included."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step_*.ckpt`."""
        return self.root / "checkpoints"

    @property
    def averages(self) -> Path:
        """Folder of the snapshots of power-function EMAs."""
        return self.root / "averages"

    @property
    def samples(self) -> Path:
        """Folder of the previews."""
        return self.root / "samples"

    @property
    def starts(self) -> Path:
        """A line of JSON for each start of the run: the step, and the environment."""
        return self.root / "starts.jsonl"

    @property
    def metrics(self) -> Path:
        """The table of all logged values."""
        return self.root / "metrics.csv"

    @property
    def exists(self) -> bool:
        """Whether training has made checkpoints here, or is about to."""
        return self.checkpoints.is_dir()


def run_of(source: str | os.PathLike[str]) -> Run | None:
    """The run that a path belongs to: its folder, the folder of its checkpoints, or a file in one of these."""
    path = Path(source)
    return next((Run(p) for p in (path, path.parent, path.parent.parent) if Run(p).exists), None)


def free_directory(directory: Path) -> Path:
    """The directory itself, or the next free number of it; says of a stopped run on the way how to go on with it."""
    candidate, number = directory, 2
    while candidate.exists() and any(candidate.iterdir()):
        if list_checkpoints(candidate) and not (Run(candidate).samples / "final.png").exists():
            print(f"{candidate} was stopped; go on with it by: diffzoo fit --run {candidate} --resume auto")
        candidate = directory.with_name(f"{directory.name}-{number}")
        number += 1
    return candidate


# -- checkpoints


def step_of(path: Path) -> int:
    """The optimizer step in the name of a checkpoint of ours or of Lightning; -1 where there is none."""
    found = re.search(r"step[_=](\d+)", path.name)
    return int(found.group(1)) if found else -1


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first, sound or not."""
    return sorted(Run(Path(run_dir)).checkpoints.glob("step_*.ckpt"), key=step_of, reverse=True)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run, or of a folder of checkpoints, sound or not; those that Lightning wrote count.

    Names decide, because copying a run changes the times of its files. Lightning's `last.ckpt` is the newest.
    """
    given = Path(folder)
    place = given if given.name == "checkpoints" else Run(given).checkpoints
    found = [p for p in place.glob("*.ckpt") if not p.name.startswith(".")]
    return max(found, key=lambda p: (p.name == "last.ckpt", step_of(p), p.stat().st_mtime), default=None)


def checksum_file(path: Path) -> Path:
    """Where the checksums of a checkpoint lie."""
    return path.with_name(path.name + ".sha256")


def checksum_lines(path: Path, digest: str = "") -> str:
    """What `sha256sum` would print in the folder of the checkpoint; a sharded checkpoint is a folder of files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return "".join(f"{sha256(p)}  {path.name}/{p.relative_to(path)}\n" for p in files)
    return f"{digest or sha256(path)}  {path.name}\n"


def is_sound(path: Path) -> bool:
    """Whether a checkpoint is whole: its checksums match, or, where it came without, its archive is intact."""
    listed = checksum_file(path)
    try:
        if listed.is_file():
            return listed.read_text() == checksum_lines(path)
        if path.is_dir():
            return False
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, EOFError):
        return False


def find_resume(run_dir: str | os.PathLike[str], report: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest sound checkpoint of a run, or None if it has none yet.

    Args:
        run_dir: directory of the run.
        report: called with a sentence for every damaged checkpoint that is passed over.

    Raises:
        UserError: if there are checkpoints but every one is damaged, so that a fresh start would bury them.
    """
    found = list_checkpoints(run_dir)
    for path, earlier in zip_longest(found, found[1:]):
        if is_sound(path):
            return path
        then = f": trying the one before it, {earlier.name}" if earlier else ""
        report(f"the checkpoint {path} is damaged (its checksum does not match){then}")
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {found[0].parent} are damaged: move that folder away to start anew"
        )
    return None


# -- one process per run directory


class RunLock:
    """Holds a run directory for this process, for the length of a block; the system frees it when the process dies.

    Only the first process of a distributed run takes the lock.

    Raises:
        UserError: on entering, if another process holds it, naming that process.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.path = Path(run_dir) / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        try:
            import fcntl
        except ImportError:  # a platform without file locks
            return self
        if not is_first_process():
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+")
        except OSError as error:
            raise UserError(
                f"the run directory {self.path.parent} cannot be written to ({error.strerror or error}): choose "
                "another with --run"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"the run directory {self.path.parent} is in use by {holder}: wait for it, stop it, or choose another "
                "directory with --run"
            ) from None
        except OSError as error:  # a file system without locks
            file.close()
            warnings.warn(f"{self.path.parent} cannot be locked ({error}): start no second run in it", stacklevel=2)
            return self
        self._file = file
        with suppress(OSError):  # a full disk: the lock holds without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(0)
            with suppress(OSError):
                self._file.close()
            self._file = None


class Launch(NamedTuple):
    """This process among those that torchrun or srun started.

    Args:
        rank: among all processes.
        world: how many there are; 1 where nothing says so.
        local: among the processes of this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process as the variables of torchrun, or else those of SLURM, describe it."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in environment:
            given = Launch(*(int(environment.get(n) or d) for n, d in zip(names, "010", strict=True)))
            return given._replace(world=max(given.world, given.rank + 1))
    return Launch()


def without_launcher(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a child that is a job of its own, not one of the processes that torchrun or srun started."""
    ours = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD GROUP_ ROLE_ NODE_RANK MASTER_ TORCHELASTIC_ SLURM_"
    return {name: value for name, value in environment.items() if not name.startswith(tuple(ours.split()))}


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first process of the job, by the variables of torchrun, SLURM or Lightning's launcher."""
    if "RANK" in environment or "SLURM_PROCID" in environment:
        return launch(environment).rank == 0
    return environment.get("NODE_RANK", "0") == "0" and environment.get("LOCAL_RANK", "0") == "0"
