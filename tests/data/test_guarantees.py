"""What `datasets` does to images and labels on their way to training, and that our readers do not.

Each test shows the behaviour of `datasets` first, so that it fails when that changes.
"""

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.stand_ins import Shards, image_bytes, rows, write_images, write_parquet
from PIL import Image

from diffzoo.data import HFDataset
from diffzoo.data.decode import Bands, load
from diffzoo.data.inspect import report
from diffzoo.errors import UserError

COMMON: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def test_lossless_files_stay_what_they_are_where_map_writes_them_anew(tmp_path: Path) -> None:
    """`map` with a function that looks at an image stores lossless WebP with loss; before it, bytes come through."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    files = [encoded(p, "WEBP", lossless=True) for p in pixels]
    table = datasets.Dataset.from_dict({"image": [{"bytes": f, "path": None} for f in files]})
    table = table.cast_column("image", datasets.Image())
    looked = table.map(lambda row: {"image": row["image"], "width": row["image"].width})
    for name, data, equal in (("kept", table, True), ("looked", looked, False)):
        data.to_parquet(tmp_path / name / "train.parquet")
        source = HFDataset(str(tmp_path / name), **COMMON).train_source
        read = [np.asarray(load(source.read_row(i).image or b"")) for i in range(4)]
        assert np.array_equal(read, pixels) == equal
        assert ([source.read_row(i).image for i in range(4)] == files) == equal


def test_classes_stay_where_one_split_has_metadata(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split, [f"{'ab'[i % 2]}/{i}.png" for i in range(4)])
    lines = [{"file_name": f"{'ab'[i % 2]}/{i}.png", "text": f"image {i}"} for i in range(4)]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert set(theirs["train"].features) == {"image", "text"}
    ours = HFDataset(str(tmp_path), **COMMON)
    assert ours.train_source.labels().tolist() == [0, 0, 1, 1]
    assert ours.val_source.labels().tolist() == [0, 0, 1, 1]


def test_a_fraction_among_labels_of_a_tar_is_not_rounded(tmp_path: Path) -> None:
    """`webdataset` takes the type of five samples: the sixth label, 0.5, becomes 0."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(8):
            for suffix, data in (
                ("png", image_bytes(i)),
                ("json", json.dumps({"label": i % 2 if i < 5 else 0.5}).encode()),
            ):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    files = {"data_files": {"train": str(tmp_path / "train.tar")}, "cache_dir": str(tmp_path / "cache")}
    theirs = datasets.load_dataset("webdataset", split="train", **files)
    assert [row["label"] for row in theirs["json"]][5:] == [0, 0, 0]
    with pytest.raises(UserError, match=r"neither texts nor whole numbers, such as 0\.5"):
        HFDataset(str(tmp_path / "train.tar"), **COMMON).prepare_data()
    labels = HFDataset(str(tmp_path / "train.tar"), label="json", **COMMON).train_source.labels()
    assert len(set(labels[:5])) == 2
    assert labels[5] not in labels[:5]  # nothing is rounded: other text, other class


def test_sixteen_bits_in_three_channels_do_not_wrap(tmp_path: Path) -> None:
    """`datasets` stores such arrays modulo 256: 256 becomes black."""
    pixels = np.zeros((1, 16, 16, 3), np.uint16)
    pixels[:, 8:] = 65535
    pixels[:, :8] = 256 * 100
    features = datasets.Features(image=datasets.Image())
    with pytest.warns(UserWarning, match="Downcasting array dtype uint16"):
        theirs = datasets.Dataset.from_dict({"image": list(pixels)}, features=features)
    assert np.asarray(theirs[0]["image"])[0, 0, 0] == 0
    (tmp_path / "p").mkdir()
    np.save(tmp_path / "p" / "0.npy", pixels[0])
    source = HFDataset(str(tmp_path / "p"), value_range=(0, 65535), **COMMON).train_source
    read = load(source.read_row(0).image or b"")
    assert isinstance(read, Bands)
    assert np.array_equal(read.values, pixels[0])


@pytest.mark.parametrize(
    ("held_out", "said"),
    [(None, "12 held-out rows have no label and all training rows have one"), ([i % 3 for i in range(12)], None)],
)
def test_labels_missing_in_one_split_are_a_trace(tmp_path: Path, held_out: list[int] | None, said: str | None) -> None:
    for split, labels in (("train", [i % 3 for i in range(12)]), ("validation", held_out)):
        columns = {"image": [{"bytes": image_bytes(i), "path": None} for i in range(12)]}
        pq.write_table(pa.table(columns | ({"label": labels} if labels else {})), tmp_path / f"{split}.parquet")
    found = report(HFDataset(str(tmp_path), **COMMON), 4).get("traces")
    assert (found is None) if said is None else said in found


def test_a_resume_reads_nothing_of_what_it_skips(tmp_path: Path) -> None:
    """`.skip` of a streamed set reads all that it skips; here a position is a place in the files."""
    write_parquet(tmp_path / "x.parquet", rows(0, 160), 4)  # 40 blocks
    common = {"batch_size": 8, "shuffle_window": 8, "lanes": 2, "num_workers": 0}
    first, second = (Shards([str(tmp_path / "x.parquet")], **common) for _ in range(2))
    walked = list(itertools.islice(first.train_dataloader(), 15))
    second.load_state_dict(first.state_dict())
    read: list[int] = []
    plain = second.train_source.read_block
    second.train_source.read_block = lambda block: read.append(block) or plain(block)
    ids = [i for batch in (*walked, next(iter(second.train_dataloader()))) for i in batch["id"].tolist()]
    assert len(set(ids)) == 128  # none twice
    assert len(set(read)) <= 8  # two batches of rows and a window, of 40 blocks
