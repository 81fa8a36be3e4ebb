"""`diffzoo data` as a stranger uses it: a folder with a broken picture, a cache of latents, a name that is nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.pictures import picture, rows, write_parquet
from hub_server import FakeHub
from PIL import Image

from diffzoo.cli.main import main
from diffzoo.evaluation import Reference

COUNT = 23


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(COUNT):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i, (16, 16)))
    broken = tmp_path / "pictures" / "cat" / "004.png"
    broken.write_bytes(broken.read_bytes()[:80])
    return tmp_path / "pictures"


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", "inspect", *arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_statistics_count_every_picture_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture that cannot be decoded is left out, not replaced by a neighbour as in training."""
    out = tmp_path / "reference.npz"
    arguments = ["--size", "16", "--networks", "random-conv", "--workers", "0"]
    assert main(["data", "stats", str(folder), "--out", str(out), *arguments]) == 0
    assert f"{COUNT - 1} pictures, 1 that cannot be decoded left out" in capsys.readouterr().out
    passport = json.loads(out.with_suffix(".json").read_text())
    assert (passport["pictures"], passport["left_out"]) == (COUNT - 1, 1)
    assert passport["sha256"] == Reference.open(out).sha256

    (folder / "cat" / "004.png").unlink()
    clean = tmp_path / "clean.npz"
    assert main(["data", "stats", str(folder), "--out", str(clean), *arguments]) == 0
    with np.load(out) as a, np.load(clean) as b:
        assert sorted(a) == sorted(b)
        assert all(np.array_equal(a[k], b[k]) for k in a)

    few = tmp_path / "few.npz"
    assert main(["data", "stats", str(folder), "--out", str(few), *arguments, "--limit", "7"]) == 0
    files = sorted(folder.rglob("*.png"))[:7]
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
    assert found["picture size"] == "16 px, resize adm"
    assert (found["mirror images"], found["classes"], found["captions"]) == ("no", 2, "no")
    assert found["autoencoder"].startswith("identity (")
    next((cache / "train").glob("*00001.safetensors")).unlink()
    assert report(capsys, str(cache))["train"]["shards"] == "2 of 3, incomplete"


def test_sizes_shapes_classes_and_licence_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, size in enumerate([(10, 20), (40, 20), (20, 20), (60, 20)]):
        file = tmp_path / "p" / f"{'ab'[i // 3]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i, size))
    found = report(capsys, str(tmp_path / "p"), "--size", "8", "--workers", "0")
    assert found["class histogram"] == {"a": 3, "b": 1}
    sizes = found["sizes of 4 pictures"]
    assert sizes["width / height"].startswith("smallest 0.50")
    assert sizes["width / height"].endswith("largest 3.00")
    assert "median 30" in sizes["width"]
    assert found["licence"] == "not stated"
    assert report(capsys, "demo", "--size", "16")["licence"] == "MIT"


def test_columns_of_a_file_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "x.parquet", rows(0, 20), 8)
    found = report(capsys, str(tmp_path / "x.parquet"), "--label", "none", "--workers", "0", "--size", "8")
    assert "classes" not in found
    assert found["captions"] == "yes"
    assert main(["data", "inspect", str(tmp_path / "x.parquet"), "--image", "img"]) == 2
    assert "its columns are image, label, captions, row" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--caption", "title"], ["--revision", "main"], ["--split", "val"]])
def test_flags_about_columns_mean_nothing_to_a_folder(
    folder: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (str(folder), "demo"):
        assert main(["data", "inspect", source, *flag]) == 2
        assert f"{flag[0]} is for Parquet, tar and Hub data sets" in capsys.readouterr().err


def test_a_name_that_is_neither_folder_nor_data_set(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["data", "inspect", "pictures/birds"]) == 2
    error = capsys.readouterr().err
    assert "no data set 'pictures/birds' on the Hub" in error
    assert "and there is no file or folder 'pictures/birds'" in error
    assert error.count("\n") == 1
