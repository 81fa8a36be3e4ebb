"""Bad pictures, bad folders, killed workers: skipped with a count, or one sentence; the position stays exact."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from data.pictures import Shards, picture, rows, signature, write_parquet
from PIL import Image

from diffzoo.data import DemoData, ImageFolder
from diffzoo.errors import UserError

COMMON = {"image_size": 8, "batch_size": 8, "num_workers": 0}


def folder(path: Path, count: int = 24, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for i in range(count):
        file = path / classes[i % len(classes)] / f"{i:03d}.png" if classes else path / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    return path


def epoch(data, epochs: int = 1) -> list[tuple[int, int]]:
    return [
        (p, r)
        for _ in range(epochs)
        for batch in data.train_dataloader()
        for p, r in zip(batch["index"].tolist(), batch["id"].tolist(), strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_skipped_and_named(tmp_path: Path, workers: int) -> None:
    folder(tmp_path)
    good = epoch(ImageFolder(str(tmp_path), **COMMON), 2)
    for name in ("cat/004.png", "dog/005.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    data = ImageFolder(str(tmp_path), **{**COMMON, "num_workers": workers})
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        seen = epoch(data, 2)
    data.teardown()
    bad = {r for r, _ in data.bad_images.items()}
    assert {data.train_source.files[r] for r in bad} == {"cat/004.png", "dog/005.png"}
    messages = [str(w.message) for w in record if "skipped a bad picture" in str(w.message)]
    assert [m.split("):")[0] for m in messages] == [f"skipped a bad picture ({k} so far" for k in (1, 2)]
    assert all(".png: " in m for m in messages)
    for (p, shown), (q, wanted) in zip(seen, good, strict=True):
        assert p == q
        assert shown not in bad
        assert shown == wanted or wanted in bad


def test_bad_pictures_up_to_a_limit(tmp_path: Path) -> None:
    folder(tmp_path)
    for i in range(0, 24, 4):
        (tmp_path / "cat" / f"{i:03d}.png").write_bytes(b"not a picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert len(epoch(ImageFolder(str(tmp_path), max_bad=6, **COMMON))) == 24
        with pytest.raises(UserError, match=r"pictures of .* cannot be decoded, more than max_bad = 5 allows"):
            epoch(ImageFolder(str(tmp_path), max_bad=5, **COMMON))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_as_errors(tmp_path: Path, workers: int) -> None:
    folder(tmp_path)
    (tmp_path / "dog" / "003.png").write_bytes(b"")
    data = ImageFolder(str(tmp_path), on_bad_image="error", **{**COMMON, "num_workers": workers})
    with pytest.raises(UserError, match=r"^cannot decode .*003\.png: .* set on_bad_image to 'skip'"):
        epoch(data)


def test_nothing_but_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="can be decoded"):
        epoch(ImageFolder(str(tmp_path), **COMMON))


def test_a_row_without_picture(tmp_path: Path) -> None:
    some = rows(0, 20)
    some[3]["image"] = None
    some[4]["image"] = {"bytes": None, "path": "gone.png"}
    write_parquet(tmp_path / "x.parquet", some, 8)
    data = Shards([str(tmp_path / "x.parquet")], batch_size=4, num_workers=0)
    with pytest.warns(UserWarning, match="no picture data"):
        seen = epoch(data, 2)
    assert set(data.bad_images) == {3, 4}
    assert not {r for _, r in seen} & {3, 4}


KILLED = """
import json, os, signal, sys
from diffzoo.data import ImageFolder
from diffzoo.data.stream import worker_failure
data = ImageFolder(sys.argv[1], image_size=8, batch_size=2, num_workers=2)
main, read = os.getpid(), data.train_source.read_row

def dying(row):
    if os.getpid() != main and row == data.order.place(14).row:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(row)

data.train_source.read_row = dying
try:
    for batch in data.train_dataloader():
        pass
except Exception as error:
    print(worker_failure(error) or error)
print(json.dumps(data.state_dict()))
"""


@pytest.mark.slow
def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    """In a process of its own: PyTorch raises the error from a signal handler, wherever the main process is."""
    folder(tmp_path, 48)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    message, state = done.stdout.splitlines()
    assert message.startswith("a data worker was killed, most likely because memory ran out")
    assert "resume from the last checkpoint" in message
    again = ImageFolder(str(tmp_path), **{**COMMON, "batch_size": 2})
    again.load_state_dict(json.loads(state))
    assert again.images_seen <= 14
    assert next(iter(again.train_dataloader()))["index"].tolist()[0] == again.images_seen - 2


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        _ = ImageFolder(str(tmp_path / "none"), **COMMON).train_source
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no pictures below .*empty.*: expected files ending in .*\.jpg"):
        _ = ImageFolder(str(tmp_path / "empty"), **COMMON).train_source
    plain = ImageFolder(str(folder(tmp_path / "plain", classes=())), **COMMON)
    assert (plain.num_classes, plain.class_names, plain.has_captions) == (0, [], False)
    assert "label" not in next(iter(plain.train_dataloader()))
    classed = ImageFolder(str(folder(tmp_path / "classed")), **COMMON)
    assert classed.class_names == ["cat", "dog"]
    batch = next(iter(classed.train_dataloader()))
    for row, label in zip(batch["id"].tolist(), batch["label"].tolist(), strict=True):
        assert classed.train_source.files[row].startswith(["cat", "dog"][label])
    (tmp_path / "classed" / "stray.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"1 pictures lie in .* 'stray.png' first"):
        _ = ImageFolder(str(tmp_path / "classed"), **COMMON).train_source
    assert ImageFolder(str(tmp_path / "classed"), classes=False, **COMMON).num_classes == 0


def test_captions_beside_pictures(tmp_path: Path) -> None:
    folder(tmp_path, 8, classes=())
    for i in range(8):
        (tmp_path / f"{i:03d}.txt").write_text(f"one {i}\n\ntwo {i}\n")
    data = ImageFolder(str(tmp_path), **COMMON)
    shown = [c for _ in range(8) for c in next(iter(data.train_dataloader()))["caption"]]
    assert set(shown) == {f"{w} {i}" for w in ("one", "two") for i in range(8)}


def test_held_out_by_name(tmp_path: Path) -> None:
    data = ImageFolder(str(folder(tmp_path, 60)), val_fraction=0.2, **COMMON)
    train = {data.train_source.read_row(i).name for i in range(len(data.train_source))}
    val = {data.val_source.read_row(i).name for i in range(len(data.val_source))}
    assert len(train) + len(val) == 60
    assert not train & val
    assert 4 <= len(val) <= 22
    other = ImageFolder(str(tmp_path), val_fraction=0.2, **{**COMMON, "seed": 5})
    assert val == {other.val_source.read_row(i).name for i in range(len(other.val_source))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "centre"}, "crop is one of center, random, got 'centre'"),
        ({"resize": "bicubic"}, "resize is one of adm, area, lanczos"),
        ({"on_bad_image": "ignore"}, "on_bad_image is one of skip, error"),
        ({"batch_size": 0}, "batch_size is a positive whole number, got 0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DemoData(**settings)


def test_a_batch_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DemoData(batch_size=30)
    monkeypatch.setattr(data, "_ranks", lambda: (0, 4))
    with pytest.raises(UserError, match="30 does not divide among 4 ranks: set batch_size to 28 or 32"):
        data.train_dataloader()


def test_balance_needs_labels(tmp_path: Path) -> None:
    data = ImageFolder(str(folder(tmp_path, classes=())), balance=True, **COMMON)
    with pytest.raises(UserError, match="balance needs labels"):
        _ = data.order


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_validation_is_complete_disjoint_and_of_equal_length(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DemoData(image_size=16, batch_size=24, num_workers=0)
    parts, lengths = [], set()
    for rank in range(world):
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, world))
        batches = list(data.val_dataloader())
        lengths.add(len(batches))
        assert len(batches) == len(data.val_dataloader())
        parts += [r for b in batches for r in b["id"].tolist()]
    assert sorted(parts) == list(range(374))
    assert len(lengths) == 1


def test_validation_is_the_same_every_time() -> None:
    data = DemoData(image_size=16, batch_size=64, num_workers=2)
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    folder(tmp_path, 40)
    shown = []
    for cache in (True, False):
        data = ImageFolder(str(tmp_path), cache=cache, **{**COMMON})
        shown.append(
            [s for _ in range(3) for b in data.train_dataloader() for s in signature({**b, "caption": [""] * 8})]
        )
    assert shown[0] == shown[1]


def test_more_ranks_and_workers_than_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "one.parquet", rows(0, 64), 64)
    seen = []
    for rank in range(4):
        data = Shards([str(tmp_path / "one.parquet")], batch_size=16, num_workers=2, shuffle_window=32, lanes=32)
        data._ranks = lambda rank=rank: (rank, 4)
        seen += epoch(data)
        data.teardown()
    assert sorted(r for _, r in seen) == list(range(64))


def test_images_of_the_batch_are_the_files(tmp_path: Path) -> None:
    """uint8, channels first, unchanged when nothing needs changing."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(picture(i, (8, 8)))
    data = ImageFolder(str(tmp_path), flip=False, **COMMON)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint8
    import numpy as np

    for row, image in zip(batch["id"].tolist(), batch["image"], strict=True):
        file = tmp_path / data.train_source.files[row]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
