"""Bad images, bad folders, killed workers: skipped with a count, or one sentence; the position stays exact."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from data.stand_ins import Shards, image_bytes, rows, signature, write_images, write_parquet
from PIL import Image

from diffzoo.data import DemoData, ImageFolder
from diffzoo.data.spans import EvalSpans
from diffzoo.errors import UserError

COMMON = {"image_size": 8, "batch_size": 8, "num_workers": 0}


def folder(path: Path, count: int = 24, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    return write_images(path, [f"{classes[i % len(classes)] if classes else '.'}/{i:03d}.png" for i in range(count)])


def epoch(data, epochs: int = 1) -> list[tuple[int, int]]:
    return [
        (p, r)
        for _ in range(epochs)
        for batch in data.train_dataloader()
        for p, r in zip(batch["index"].tolist(), batch["id"].tolist(), strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_named(tmp_path: Path, workers: int) -> None:
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
    messages = [str(w.message) for w in record if "skipped a bad image" in str(w.message)]
    assert [m.split("):")[0] for m in messages] == [f"skipped a bad image ({k} so far" for k in (1, 2)]
    assert all(".png: " in m for m in messages)
    for (p, shown), (q, wanted) in zip(seen, good, strict=True):
        assert p == q
        assert shown not in bad
        assert shown == wanted or wanted in bad


def test_bad_images_up_to_a_limit(tmp_path: Path) -> None:
    folder(tmp_path)
    for i in range(0, 24, 4):
        (tmp_path / "cat" / f"{i:03d}.png").write_bytes(b"not an image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert len(epoch(ImageFolder(str(tmp_path), max_bad=6, **COMMON))) == 24
        with pytest.raises(UserError, match=r"images of .* cannot be decoded, more than max_bad = 5 allows"):
            epoch(ImageFolder(str(tmp_path), max_bad=5, **COMMON))


def test_bad_images_count_over_resumes(tmp_path: Path) -> None:
    """The limit is one for the whole run, however often it is resumed."""
    folder(tmp_path)
    for i in range(0, 24, 4):
        (tmp_path / "cat" / f"{i:03d}.png").write_bytes(b"not an image")
    first = ImageFolder(str(tmp_path), max_bad=6, **COMMON)
    with pytest.warns(UserWarning, match="skipped a bad image") as record:
        epoch(first)
    assert "(6 so far)" in str(record[-1].message)
    state = json.loads(json.dumps(first.state_dict()))
    again = ImageFolder(str(tmp_path), max_bad=6, **COMMON)
    again.load_state_dict(state)
    assert again.bad_images == first.bad_images
    epoch(again)  # meets the same six, of which nobody is told again
    strict = ImageFolder(str(tmp_path), max_bad=5, **COMMON)
    strict.load_state_dict(state)
    with pytest.raises(UserError, match=r"6 images of .* more than max_bad = 5 allows"):
        epoch(strict)


def held_out_with_bad(path: Path, bad: tuple[int, ...], **settings) -> ImageFolder:
    folder(path / "train", 8)
    folder(path / "val")
    data = ImageFolder(str(path / "train"), val_path=str(path / "val"), **{**COMMON, **settings})
    for row in bad:
        (path / "val" / data.val_source.files[row]).write_bytes(b"not an image")
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_held_out_images_are_left_out(tmp_path: Path, workers: int) -> None:
    data = held_out_with_bad(tmp_path, (1, 9, 10), num_workers=workers)
    with pytest.warns(UserWarning, match=r"left out a bad image \(. so far\): .*\.png") as record:
        batches = list(data.val_dataloader())
    assert len([w for w in record if "left out" in str(w.message)]) == 3
    assert [r for b in batches for r in b["id"].tolist()] == [r for r in range(24) if r not in (1, 9, 10)]
    assert all(len(b["id"]) == len(b["image"]) == len(b["label"]) for b in batches)
    assert set(data.bad_held_out) == {1, 9, 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sum(len(b["id"]) for b in data.one_pass("validation", 5)) == 21  # nobody is told again
    assert not data.bad_images


@pytest.mark.filterwarnings("ignore:left out a bad image")
def test_bad_held_out_images_have_the_same_limit(tmp_path: Path) -> None:
    held_out_with_bad(tmp_path, (1, 9))
    where = {"path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}
    with pytest.raises(UserError, match=r"1 images of .*val.* more than max_bad = 0"):
        list(ImageFolder(**where, max_bad=0, **COMMON).val_dataloader())
    with pytest.raises(UserError, match="set on_bad_image to 'skip'"):
        list(ImageFolder(**where, on_bad_image="error", **COMMON).val_dataloader())


@pytest.mark.filterwarnings("ignore:left out a bad image")
def test_ranks_validate_equally_often_despite_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of nothing but bad images is made up for; all else is shown once."""
    bad = (8, 9, 10, 11, 12)
    data = held_out_with_bad(tmp_path, bad, batch_size=4)
    shown = []
    for rank in range(2):
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, 2))
        shown.append([b["id"].tolist() for b in data.val_dataloader()])
    assert [len(s) for s in shown] == [6, 6]
    rows = [r for s in shown for b in s for r in b]
    assert set(rows) == set(range(24)) - set(bad)
    assert len(rows) == len(set(rows)) + 2  # the batches (8, 9) and (10, 11)
    monkeypatch.setattr(data, "_ranks", lambda: (0, 1))
    for row in range(24):
        (tmp_path / "val" / data.val_source.files[row]).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the images of .* can be decoded"):
        list(data.val_dataloader())


def by_blocks(path: Path, bad: tuple[int, ...], by_block: bool, workers: int = 0) -> Shards:
    path.mkdir(exist_ok=True)
    some = rows(0, 60)
    for row in bad:
        some[row]["image"] = {"bytes": some[row]["image"]["bytes"][:90], "path": None}
    write_parquet(path / "x.parquet", some, 8)
    layout = {"shuffle_window": 24, "lanes": 4, "crop": "random"}
    return Shards([str(path / "x.parquet")], by_block, batch_size=8, num_workers=workers, **layout)


def walk(data: Shards, steps: int) -> list[tuple]:
    seen: list[tuple] = []
    while len(seen) < 8 * steps:
        for _, batch in zip(range(steps - len(seen) // 8), data.train_dataloader(), strict=False):
            seen += signature(batch)
    return seen


@pytest.mark.filterwarnings("ignore:skipped a bad image")
@pytest.mark.parametrize(("by_block", "order"), [(True, (2, 0, 1)), (False, (0, 1, 2))])
def test_bad_images_break_no_resume(tmp_path: Path, by_block: bool, order: tuple[int, ...]) -> None:
    """Rows, captions and pixels, on 0, 1 and 2 workers and after resumes; neighbours stand in for bad ones alone."""
    bad = (3, 4, 5, 17, 30, 59)
    whole = walk(by_blocks(tmp_path / "bad", bad, by_block), 24)
    good = walk(by_blocks(tmp_path / "good", (), by_block), 24)
    assert [s == g for s, g in zip(whole, good, strict=True)] == [g[1] not in bad for g in good]
    assert not {s[1] for s in whole} & set(bad)
    seen, state = [], None
    for steps, workers in zip((5, 9, 10), order, strict=True):
        data = by_blocks(tmp_path / "bad", bad, by_block, workers)
        if state is not None:
            data.load_state_dict(json.loads(state))
        seen += walk(data, steps)
        state = json.dumps(data.state_dict())
        data.teardown()
    assert seen == whole
    assert set(data.bad_images) == set(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_as_errors(tmp_path: Path, workers: int) -> None:
    folder(tmp_path)
    (tmp_path / "dog" / "003.png").write_bytes(b"")
    data = ImageFolder(str(tmp_path), on_bad_image="error", **{**COMMON, "num_workers": workers})
    with pytest.raises(UserError, match=r"^cannot decode .*003\.png: .* set on_bad_image to 'skip'"):
        epoch(data)


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="can be decoded"):
        epoch(ImageFolder(str(tmp_path), **COMMON))


def test_a_row_without_image(tmp_path: Path) -> None:
    some = rows(0, 20)
    some[3]["image"] = None
    some[4]["image"] = {"bytes": None, "path": "gone.png"}
    write_parquet(tmp_path / "x.parquet", some, 8)
    data = Shards([str(tmp_path / "x.parquet")], batch_size=4, num_workers=0)
    with pytest.warns(UserWarning, match="no image data"):
        seen = epoch(data, 2)
    assert set(data.bad_images) == {3, 4}
    assert not {r for _, r in seen} & {3, 4}


KILLED = """
import json, os, signal, sys
from diffzoo.data import ImageFolder
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
    print(error)
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


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_killed_while_it_hands_over_a_batch(tmp_path: Path, killed: bool) -> None:
    """Then the connection breaks before the death is seen; an error of a worker that lives is passed on."""
    data = ImageFolder(str(folder(tmp_path)), **{**COMMON, "num_workers": 1})
    loader = data.make_worker_loader(0)
    next(loader)
    inner = loader._iterator

    class Broken:
        _workers = inner._workers

        def __next__(self) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

    loader._iterator = Broken()
    if killed:
        inner._workers[0].kill()
    with pytest.raises(
        UserError if killed else ConnectionResetError, match="a data worker was killed" if killed else "reset by peer"
    ):
        next(loader)
    inner._shutdown_workers()


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        _ = ImageFolder(str(tmp_path / "none"), **COMMON).train_source
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images below .*empty.*: expected files ending in .*\.jpg"):
        _ = ImageFolder(str(tmp_path / "empty"), **COMMON).train_source
    plain = ImageFolder(str(folder(tmp_path / "plain", classes=())), **COMMON)
    assert (plain.num_classes, plain.class_names, plain.has_captions) == (0, [], False)
    assert "label" not in next(iter(plain.train_dataloader()))
    classed = ImageFolder(str(folder(tmp_path / "classed")), **COMMON)
    assert classed.class_names == ["cat", "dog"]
    batch = next(iter(classed.train_dataloader()))
    for row, label in zip(batch["id"].tolist(), batch["label"].tolist(), strict=True):
        assert classed.train_source.files[row].startswith(["cat", "dog"][label])
    (tmp_path / "classed" / "stray.png").write_bytes(image_bytes(1))
    with pytest.raises(UserError, match=r"1 images lie in .* 'stray.png' first"):
        _ = ImageFolder(str(tmp_path / "classed"), **COMMON).train_source
    assert ImageFolder(str(tmp_path / "classed"), classes=False, **COMMON).num_classes == 0


def test_captions_beside_images(tmp_path: Path) -> None:
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
        ({"crop": "centre"}, "expected crop to be one of 'center', 'random', got 'centre'"),
        ({"resize": "bicubic"}, "expected resize to be one of 'adm', 'area', 'lanczos'"),
        ({"on_bad_image": "ignore"}, "expected on_bad_image to be one of 'skip', 'error'"),
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


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_ranks_validate_equally_often(world: int) -> None:
    """Rows that do not divide, a share of one image, fewer rows than ranks."""
    for rows_, batch in [(r, b * world) for r in range(1, 40) for b in (1, 2, 3, 8)]:
        parts = [EvalSpans(rows_, batch, rank, world) for rank in range(world)]
        spans = [list(p) for p in parts]
        assert {len(s) for s in spans} == {len(parts[0])}, (rows_, batch)
        assert all(count > 0 for s in spans for _, count in s)
        shown = [row for s in spans for start, count in s for row in range(start, start + count)]
        assert shown == (list(range(rows_)) if rows_ >= world else [])


def test_fewer_held_out_images_than_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank validates: if some did, the others would wait for them, or they for the others."""
    folder(tmp_path / "train", 8)
    folder(tmp_path / "val", 2)
    data = ImageFolder(str(tmp_path / "train"), val_path=str(tmp_path / "val"), **COMMON)
    for rank in range(4):
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, 4))
        with pytest.warns(UserWarning, match="nothing is validated: .* holds 2 images out, fewer than the 4 ranks"):
            assert data.val_dataloader() == []


@pytest.mark.parametrize(("workers", "window", "warned"), [(1, 64, False), (2, 64, True), (2, 32, False)])
def test_a_small_streamed_set_is_fetched_by_every_worker(
    tmp_path: Path, workers: int, window: int, warned: bool
) -> None:
    write_parquet(tmp_path / "x.parquet", rows(0, 60), 8)
    data = Shards([str(tmp_path / "x.parquet")], batch_size=8, num_workers=workers, shuffle_window=window)
    data.train_source.remote = True
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        data.train_dataloader()
    told = [str(w.message) for w in record if "fetches and holds all 60 rows of shards" in str(w.message)]
    assert len(told) == warned
    assert all("set streaming to false" in t for t in told)


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
    write_images(tmp_path, [f"{i}.png" for i in range(8)], (8, 8))
    data = ImageFolder(str(tmp_path), flip=False, **COMMON)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint8
    import numpy as np

    for row, image in zip(batch["id"].tolist(), batch["image"], strict=True):
        file = tmp_path / data.train_source.files[row]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
