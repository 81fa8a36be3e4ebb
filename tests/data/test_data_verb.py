"""`diffzoo data` as a stranger uses it: a folder with a broken image, a cache of latents, a name that is nothing."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.stand_ins import image_bytes, rows, write_images, write_parquet
from hub_server import FakeHub
from PIL import Image

from diffzoo.cli.main import main
from diffzoo.data import ImageFolder
from diffzoo.evaluation import Reference

COUNT = 23


@pytest.fixture(autouse=True)
def _quick_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contact sheets go to the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("diffzoo.data.inspect.MEASURED_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", [f"{('cat', 'dog')[i % 2]}/{i:03d}.png" for i in range(COUNT)], (16, 16))
    broken = tmp_path / "images" / "cat" / "004.png"
    broken.write_bytes(broken.read_bytes()[:80])
    return tmp_path / "images"


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", "inspect", *arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_statistics_count_every_image_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that cannot be decoded is left out, not replaced by a neighbour as in training."""
    out = tmp_path / "reference.npz"
    arguments = ["--size", "16", "--networks", "random-conv", "--workers", "0"]
    assert main(["data", "stats", str(folder), "--out", str(out), *arguments]) == 0
    assert f"{COUNT - 1} images, 1 that cannot be decoded left out" in capsys.readouterr().out
    cache_metadata = json.loads(out.with_suffix(".json").read_text())
    assert (cache_metadata["images"], cache_metadata["left_out"]) == (COUNT - 1, 1)
    kept = [row for row, file in enumerate(sorted(folder.rglob("*.png"))) if file.name != "004.png"]
    assert cache_metadata["ids"] == hashlib.sha256(struct.pack(f"<{len(kept)}q", *kept)).hexdigest()
    assert cache_metadata["sha256"] == Reference.open(out).sha256

    (folder / "cat" / "004.png").unlink()
    clean = tmp_path / "clean.npz"
    assert main(["data", "stats", str(folder), "--out", str(clean), *arguments]) == 0
    with np.load(out) as a, np.load(clean) as b:
        assert sorted(a) == sorted(b)
        assert all(np.array_equal(a[k], b[k]) for k in a)

    few = tmp_path / "few.npz"
    assert main(["data", "stats", str(folder), "--out", str(few), *arguments, "--limit", "7"]) == 0
    files = sorted(folder.rglob("*.png"))[:7]
    assert json.loads(few.with_suffix(".json").read_text())["images"] == 7
    with np.load(few) as archive:
        images = next(archive[k] for k in archive if archive[k].ndim == 4 and archive[k].dtype == np.uint8)
        channels_last = images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1)
        assert np.array_equal(channels_last, np.stack([np.asarray(Image.open(f)) for f in files]))


def test_a_cache_of_latents_is_described(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    arguments = ["--autoencoder", "identity", "--size", "16", "--shard-rows", "10", "--workers", "0", "--no-flips"]
    assert main(["data", "encode", str(folder), "--out", str(cache), *arguments]) == 0
    assert "004.png" in capsys.readouterr().err
    found = report(capsys, str(cache))["train"]
    assert found["shards"] == "3 of 3"
    assert found["image size"] == "16 px, resize adm"
    assert (found["mirror images"], found["classes"], found["captions"]) == ("no", 2, "no")
    assert found["autoencoder"].startswith("identity (")
    whole = report(capsys, str(cache), "--workers", "0")
    assert whole["train"]["images"] == f"{COUNT - 1} of the {COUNT} of {folder}"
    assert whole["train"]["latent size"] == "16 x 16 px"
    assert whole["class histogram"] == {"cat": 11, "dog": 11}
    assert rate(whole) > 0
    assert not list(Path().iterdir())
    for flag in (["--sheet", "x.png"], ["--size", "64"], ["--sample", "9"], ["--split", "val"], ["--resize", "adm"]):
        assert main(["data", "inspect", str(cache), *flag]) == 2
        assert f"{flag[0]} means nothing to {cache}, which is a cache of latents" in capsys.readouterr().err
    sound = (cache / "train" / "passport.json").read_text()
    (cache / "train" / "passport.json").write_text(sound.replace(f'"pictures": {COUNT - 1}', '"pictures": 9'))
    assert main(["data", "inspect", str(cache)]) == 2
    assert "but their metadata say 9" in capsys.readouterr().err


def test_an_unfinished_cache_is_described(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    arguments = ["--autoencoder", "identity", "--size", "16", "--shard-rows", "10", "--workers", "0", "--max-bad", "0"]
    assert main(["data", "encode", str(folder), "--out", str(cache), *arguments]) == 2
    assert "1 images of" in capsys.readouterr().err
    found = report(capsys, str(cache))
    assert found["train"]["shards"] == "1 of 3, incomplete"
    assert found["train"]["images"] == f"none counted yet of the {COUNT} of {folder}"


def rate(found: dict[str, Any]) -> float:
    match = re.fullmatch(r"([\d.]+) images/s at \d+ px with \d+ workers", found["throughput"])
    assert match, found["throughput"]
    return float(match[1])


@pytest.mark.parametrize("count", [1, 2, 10, 25, 95])
def test_small_sets_have_a_throughput(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of less than two batches: they are passed over and over."""
    write_images(tmp_path / "p", [f"{i}.png" for i in range(count)])
    assert rate(report(capsys, str(tmp_path / "p"), "--size", "8", "--workers", "0")) > 0


def test_a_contact_sheet_is_written_unless_it_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "x.parquet", rows(0, 20), 8)
    arguments = ["--size", "8", "--workers", "0"]
    for source, name in ((str(folder), "images-sheet.png"), (str(tmp_path / "x.parquet"), "x-sheet.png")):
        assert report(capsys, source, *arguments, "--no-sheet").get("contact sheet") is None
        assert not list(Path().iterdir())
        assert main(["data", "inspect", source, *arguments]) == 0
        assert f"contact sheet: {name}\n" in capsys.readouterr().out
        with Image.open(name) as sheet:
            assert sheet.width > 64
        Path(name).unlink()
    assert report(capsys, str(folder), *arguments, "--sheet", "other.png")["contact sheet"] == "other.png"
    assert [p.name for p in Path().iterdir()] == ["other.png"]


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not only in JSON."""
    assert main(["data", "inspect", str(folder), "--size", "8", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^class histogram:\n  cat  12\n  dog  11$", out, re.MULTILINE)
    assert re.search(r"^sizes of 23 images:\n  width +smallest 16, .* largest 16\n", out, re.MULTILINE)
    assert re.search(r"^  width / height +smallest 1\.00, .*median 1\.00", out, re.MULTILINE)
    assert re.search(r"^bad images: 1 of 23$", out, re.MULTILINE)


def test_metadata_of_images_are_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_images(tmp_path / "p", [f"{i}.png" for i in range(4)])
    table = pa.table({"file_name": [f"{i}.png" for i in range(3)], "text": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "p" / "metadata.parquet")
    found = report(capsys, str(tmp_path / "p"), "--size", "8", "--workers", "0")
    assert (found["rows"]["train"], found["captions"]) == (3, "yes")


def test_folders_of_splits_are_no_classes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / "notes").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("two splits")
    for split, first in (("train", 0), ("val", 100)):
        for i in range(first, first + 6):
            file = tmp_path / "set" / split / ("ant", "bee", "cow")[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes(i))
    arguments = [str(tmp_path / "set"), "--size", "8", "--workers", "0"]
    assert main(["data", "inspect", *arguments, "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    said = "image files, splits train (in train), validation (in val); not read: README.md; "
    said += "labels: the folders (3 classes: ant, bee, cow); captions: none; held out: "
    assert found["read as"] == said + "validation"
    assert found["read as"] in output.err
    assert found["class histogram"] == {"ant": 2, "bee": 2, "cow": 2}
    assert found["rows"] == {"train": 6, "held out": 6}
    cache = tmp_path / "cache"
    encode = ["--autoencoder", "identity", "--out", str(cache)]
    assert main(["data", "encode", *arguments, *encode]) == 0
    assert {part.name for part in cache.iterdir()} == {"train", "validation"}
    capsys.readouterr()
    found = report(capsys, *arguments, "--split", "val")
    assert (found["source"], found["rows"]["held out"]) == (str(tmp_path / "set" / "val"), 0)
    (tmp_path / "set" / "train").rename(tmp_path / "set" / "test")
    assert main(["data", "inspect", *arguments]) == 2
    assert "has no split 'train'; known: test, validation" in capsys.readouterr().err
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "training")
    assert report(capsys, *arguments)["source"] == str(tmp_path / "set" / "training")
    assert ImageFolder(str(tmp_path / "set"), image_size=8).class_names == ["ant", "bee", "cow"]  # as `fit` reads it
    (tmp_path / "set" / "val").rename(tmp_path / "set" / "ship")  # training and ship: classes
    assert report(capsys, *arguments)["class histogram"] == {"ship": 6, "training": 6}


def test_sizes_shapes_classes_and_licence_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, size in enumerate([(10, 20), (40, 20), (20, 20), (60, 20)]):
        file = tmp_path / "p" / f"{'ab'[i // 3]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(i, size))
    found = report(capsys, str(tmp_path / "p"), "--size", "8", "--workers", "0")
    assert found["class histogram"] == {"a": 3, "b": 1}
    sizes = found["sizes of 4 images"]
    assert sizes["width / height"].startswith("smallest 0.50")
    assert sizes["width / height"].endswith("largest 3.00")
    assert "median 30" in sizes["width"]
    assert found["licence"] == "not stated"
    assert report(capsys, "demo", "--size", "16")["licence"] == "MIT"


def test_rows_without_a_class_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"bytes": image_bytes(i), "path": None} for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [0, None, 2, 2]}), tmp_path / "x.parquet")
    found = report(capsys, str(tmp_path / "x.parquet"))
    assert (found["class histogram"], found["rows without a class"]) == ({"0": 1, "1": 0, "2": 2}, 1)


def test_columns_of_a_file_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "x.parquet", rows(0, 20), 8)
    found = report(capsys, str(tmp_path / "x.parquet"), "--label", "none", "--workers", "0", "--size", "8")
    assert "classes" not in found
    assert found["captions"] == "yes"
    assert main(["data", "inspect", str(tmp_path / "x.parquet"), "--image", "img"]) == 2
    assert "its columns are image, label, captions, row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--caption", "title", "no caption column 'title'"),
        ("--revision", "main", "has no revisions"),
        ("--split", "val", "has no split 'val'"),
    ],
)
def test_flags_that_name_what_a_source_does_not_have(
    folder: Path, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, said in ((str(folder), message), ("demo", f"{flag} means nothing to the demo set")):
        assert main(["data", "inspect", source, flag, value]) == 2
        assert said in capsys.readouterr().err


def test_a_name_that_is_neither_folder_nor_data_set(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["data", "inspect", "images/birds"]) == 2
    error = capsys.readouterr().err
    assert "no data set 'images/birds' on the Hub" in error
    assert "and there is no file or folder 'images/birds'" in error
    assert error.count("\n") == 1
