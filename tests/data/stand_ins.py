"""Small data sets on disk for the tests."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from diffzoo.data.base import ImageDataModule
from diffzoo.data.metadata import Columns
from diffzoo.data.tables import TableSource


def image_bytes(i: int, size: tuple[int, int] = (20, 14), kind: str = "PNG") -> bytes:
    """A random image that is a function of i."""
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int] = (20, 14)) -> Path:
    """Image files below a folder, which is returned; the i-th holds image i."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(i, size))
    return folder


def write_parquet(path: Path, rows: list[dict], row_group: int) -> None:
    """Rows of image bytes, label and captions."""
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("captions", pa.list_(pa.string())),
            ("row", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group)


def rows(first: int, count: int) -> list[dict]:
    """Rows first … first + count - 1."""
    return [
        {
            "image": {"bytes": image_bytes(i), "path": None},
            "label": i % 3,
            "captions": [f"{i} a", f"{i} b", f"{i} c"][: 1 + i % 3],
            "row": i,
        }
        for i in range(first, first + count)
    ]


def uneven_shards(folder: Path) -> list[str]:
    """150 rows in four files of unequal length, one of them without any row; row groups of 16."""
    first = 0
    for k, count in enumerate((67, 0, 16, 67)):
        write_parquet(folder / f"shard-{k}.parquet", rows(first, count), 16)
        first += count
    return [str(folder / f"shard-{k}.parquet") for k in range(4)]


class Shards(ImageDataModule):
    """Parquet files read by row group, as a large or remote set is."""

    def __init__(self, files: list[str], by_block: bool = True, **common):
        super().__init__(image_size=8, **common)
        self.files, self.by_block = files, by_block

    def open_source(self, part):
        columns = Columns("image", "label", "captions")
        source = TableSource(self.files, columns, "shards")
        if self.by_block:
            source.random_access = False
        return source if part == "train" else None


def signature(batch: dict) -> list[tuple]:
    """What identifies each sample: position, row, caption and the pixels after crop and flip, in any process."""
    pixels = [hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in batch["image"]]
    return list(zip(batch["index"].tolist(), batch["id"].tolist(), batch["caption"], pixels, strict=True))


class Recorder(LightningModule):
    """A module that trains nothing and writes down what it was shown."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple] = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if self.stop_at is not None and self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == self.stop_at:
            raise KeyboardInterrupt
        self.seen += signature(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quiet_trainer(folder: Path, **settings) -> Trainer:
    """A trainer on the CPU without bars, logs or sanity checks."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "max_epochs": -1,
    }
    return Trainer(**{**defaults, **settings})
