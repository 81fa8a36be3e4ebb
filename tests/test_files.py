"""Files are there whole or not at all."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffzoo.files import atomic_path, write_text


def fail_halfway(path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0


def test_a_failed_write_keeps_the_old_file(tmp_path) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_and_leaves_nothing_behind(tmp_path) -> None:
    path = write_text(tmp_path / "deep" / "a.txt", "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_what_a_killed_writer_left_disturbs_nobody(tmp_path: Path) -> None:
    script = f"""
import os, signal
from diffzoo.files import atomic_path
with atomic_path({str(tmp_path / "a.txt")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    assert write_text(tmp_path / "a.txt", "new").read_text() == "new"


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                write_text(tmp_path / "a.txt", str(number) * 100)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert everything(tmp_path) == ["a.txt"]
    assert len(set((tmp_path / "a.txt").read_text())) == 1
