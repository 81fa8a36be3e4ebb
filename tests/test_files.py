"""Files are there whole or not at all."""

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
