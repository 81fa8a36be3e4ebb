"""Files are there whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffzoo.files import HOST, atomic_path, write_text


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


def test_what_a_killed_writer_left_is_removed_with_the_next_write(tmp_path: Path) -> None:
    """Also the temporary file that safetensors makes beside its target."""
    script = f"""
import pathlib, time
from diffzoo.files import atomic_path
with atomic_path({str(tmp_path / "a.txt")!r}) as temporary:
    temporary.write_text("half")
    temporary.with_name(".tmpABC").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    write_text(tmp_path / "a.txt", "while it lives")
    assert len(everything(tmp_path)) == 5  # the file, two folders and two halves
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    write_text(tmp_path / "a.txt", "new")
    assert everything(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("host", "hours", "stays"), [("elsewhere", 1, True), ("elsewhere", 25, False), (HOST, 25, False)]
)
def test_drafts_of_other_machines_go_when_they_are_old(tmp_path: Path, host: str, hours: float, stays: bool) -> None:
    draft = tmp_path / ".a.txt.part" / f"{host}.{os.getpid()}.x" / "draft"
    draft.parent.mkdir(parents=True)
    draft.write_text("half")
    for path in (draft, draft.parent):
        os.utime(path, (time.time() - hours * 3600,) * 2)
    write_text(tmp_path / "a.txt", "new")
    assert draft.exists() == stays


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
