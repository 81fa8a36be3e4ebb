"""What a place is: splits, classes, metadata, labels and captions, whatever it is kept in. Every reader agrees."""

import io
import json
import os
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.stand_ins import image_bytes, write_images

from diffzoo.data import HFDataset, ImageFolder
from diffzoo.data.base import ImageDataModule
from diffzoo.data.resolve import resolve
from diffzoo.data.sources import Source, held_out
from diffzoo.errors import UserError

COMMON: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}


def rows_of(source: Source) -> list[tuple[bytes | None, int | None]]:
    records = [source.read_row(i) for i in range(len(source))]
    return [(r.image, r.label) for r in records]


def packed(folder: Path, kind: str) -> str:
    """A folder as a zip file, or as a tar file with or without "./" before names."""
    file = folder.with_suffix(f".{kind[:3]}")
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for p in paths:
                archive.write(p, p.relative_to(folder.parent))  # one folder around everything
            archive.writestr("__MACOSX/p/._1.png", b"x")
    else:
        with tarfile.open(file, "w") as tar:
            for p in paths:
                tar.add(p, ("./" if "." in kind else "") + p.relative_to(folder).as_posix())
    return str(file)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar of ."])
def test_an_archive_holds_what_its_folder_holds(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path / "p", [f"{['ant', 'bee', 'cow'][i % 3]}/{i}.png" for i in range(9)])
    (folder / "README.md").write_text("what it is")
    plain = ImageFolder(str(folder), **COMMON)
    archive = ImageFolder(packed(folder, kind), **COMMON)
    assert archive.class_names == plain.class_names == ["ant", "bee", "cow"]
    assert rows_of(archive.train_source) == rows_of(plain.train_source)
    with_workers = HFDataset(packed(folder, kind), image_size=8, batch_size=9, num_workers=2, flip=False)
    batch = next(iter(with_workers.train_dataloader()))
    assert sorted(batch["id"].tolist()) == list(range(9))
    with_workers.teardown()


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, first in (("train", 0), ("test", 10)):
        rows = {"image": [{"bytes": image_bytes(first + i), "path": None} for i in range(5)], "label": [0, 1, 1, 0, 1]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved" / split)
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    data = HFDataset(str(tmp_path / "saved"), **COMMON)
    assert data.class_names == ["no", "yes"]
    assert rows_of(data.train_source) == [(image_bytes(i), [0, 1, 1, 0, 1][i]) for i in range(5)]
    assert data.val_source is not None
    assert rows_of(data.val_source)[0] == (image_bytes(10), 0)
    again = HFDataset(str(tmp_path / "saved"), **COMMON)
    again.load_state_dict(data.state_dict())


@pytest.mark.parametrize("around", ["", "outer/"])
@pytest.mark.parametrize("module", [ImageFolder, HFDataset])
def test_folders_of_splits_are_splits_to_every_module(tmp_path: Path, module: Any, around: str) -> None:
    names = [f"{around}{split}/{c}/{i}.png" for split in ("Train", "valid") for c in ("x", "y") for i in range(2)]
    data = module(str(write_images(tmp_path, names)), **COMMON)
    assert data.class_names == ["x", "y"]
    assert (len(data.train_source), len(data.val_source)) == (4, 4)
    assert data.val_source.read_row(0).image == image_bytes(4)


def test_metadata_above_the_splits_speaks_of_each(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/0.png", "train/1.png", "val/2.png"])
    lines = [json.dumps({"file_name": f"{s}/{i}.png", "text": f"a cat {i}"}) for s, i in (("train", 1), ("val", 2))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = ImageFolder(str(tmp_path), **COMMON)
    assert [data.train_source.read_row(i).captions for i in range(len(data.train_source))] == [("a cat 1",)]
    assert data.val_source is not None
    assert data.val_source.read_row(0).captions == ("a cat 2",)


@pytest.mark.parametrize(("labels", "names"), [([1, 0, 1], ["0", "1"]), (None, [])])
def test_counting_folders_of_edm_are_no_classes(tmp_path: Path, labels: list[int] | None, names: list[str]) -> None:
    files = [f"{i:05d}/img{i:08d}.png" for i in range(3)]
    write_images(tmp_path, files)
    pairs = None if labels is None else list(map(list, zip(files, labels, strict=True)))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    data = ImageFolder(str(tmp_path), **COMMON)
    assert data.class_names == names
    assert [label for _, label in rows_of(data.train_source)] == (labels or [None] * 3)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_images_in_one_folder_are_no_classes_of_their_own(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path / "p", [f"all/{i}.png" for i in range(3)])
    data = HFDataset(str(folder) if kind == "folder" else packed(folder, kind), **COMMON)
    assert data.num_classes < 2


def test_what_lies_outside_of_splits_is_listed_and_a_tar_of_splits_is_refused(tmp_path: Path) -> None:
    folder = write_images(
        tmp_path / "p", [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in range(2)]
    )
    with pytest.raises(UserError, match=r"p\.tar holds the splits train, val: unpack it"):
        HFDataset(packed(folder, "tar"), **COMMON).train_source  # noqa: B018
    write_images(folder, ["more/9.png"])
    assert "not read: more/9.png; labels: the folders (2 classes: a, b);" in HFDataset(str(folder), **COMMON).decision


def test_tables_beside_tar_files_of_the_same_name_are_no_data(tmp_path: Path) -> None:
    """As img2dataset writes them."""
    images = write_images(tmp_path / "p", [f"{i}.png" for i in range(3)])
    (tmp_path / "out").mkdir()
    os.rename(packed(images, "tar"), tmp_path / "out" / "00000.tar")
    pq.write_table(pa.table({"url": ["u"] * 3}), tmp_path / "out" / "00000.parquet")
    (tmp_path / "out" / "00000_stats.json").write_text("{}")
    assert [image for image, _ in rows_of(HFDataset(str(tmp_path / "out"), **COMMON).train_source)] == [
        image_bytes(i) for i in range(3)
    ]


def test_class_folders_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    data = ImageFolder(str(write_images(tmp_path, [f"{c}/1.png" for c in range(12)])), **COMMON)
    assert data.class_names == [str(c) for c in range(12)]
    assert dict(rows_of(data.train_source))[image_bytes(10)] == 10


@pytest.mark.filterwarnings("ignore:2 links below")
def test_links_that_lead_nowhere_or_in_a_circle_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "p", ["a/0.png", "b/1.png"])
    write_images(tmp_path / "elsewhere", ["2.png"])
    os.symlink("/nowhere/gone.png", tmp_path / "p" / "a" / "gone.png")
    os.symlink(tmp_path / "p", tmp_path / "p" / "a" / "round")
    os.symlink(tmp_path / "elsewhere", tmp_path / "p" / "c")
    data = ImageFolder(str(tmp_path / "p"), **COMMON)
    assert data.train_source.files == ["a/0.png", "b/1.png", "c/2.png"]
    with pytest.warns(UserWarning, match=r"2 links below .* lead nowhere or in a circle, a/gone\.png first"):
        assert ImageFolder(str(tmp_path / "p"), **COMMON).train_source.rows_hash


def test_labels_from_the_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["great_dane_12.jpg", "n01440764_10026.JPEG", "cat.0.jfif", "great_dane_3.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "p", names)
    assert ImageFolder("~/p", label="prefix", **COMMON).class_names == ["cat", "great_dane", "n01440764"]
    tar = HFDataset(packed(tmp_path / "p", "tar"), label="prefix", **COMMON)
    assert tar.class_names[1:] == ["great_dane", "n01440764"]


def test_one_stray_image_costs_no_labels_in_silence(tmp_path: Path) -> None:
    """`imagefolder` of `datasets` drops the labels of all."""
    write_images(tmp_path, ["a/0.png", "b/1.png", "stray.png"])
    with pytest.raises(UserError, match=r"1 images lie in .* 'stray\.png' first"):
        HFDataset(str(tmp_path), **COMMON).train_source  # noqa: B018


# ---- values


def table(path: Path, **columns: Any) -> str:
    count = len(next(iter(columns.values())))
    images = [{"bytes": image_bytes(i), "path": None} for i in range(count)]
    pq.write_table(pa.table({"image": images, **columns}), path)
    return str(path)


def as_folder(path: Path, **columns: Any) -> str:
    """The same rows as images with metadata."""
    count = len(next(iter(columns.values())))
    write_images(path, [f"{i}.png" for i in range(count)])
    lines = [{"file_name": f"{i}.png", **{k: v[i] for k, v in columns.items()}} for i in range(count)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(path)


PLACES = {"table": lambda p, **c: table(p / "x.parquet", **c), "folder": lambda p, **c: as_folder(p / "x", **c)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([2024000017, 5, 2024000017, 2024000001], ["5", "2024000001", "2024000017"], [2, 0, 2, 1]),
        ([0, 3, 1, 1], ["0", "1", "2", "3"], [0, 3, 1, 1]),
        ([1.0, 0.0, 1.0, 0.0], ["0", "1"], [1, 0, 1, 0]),
        (["10", "9", "10", "2"], ["2", "9", "10"], [2, 1, 2, 0]),
        ([True, False, True, True], ["0", "1"], [1, 0, 1, 1]),
    ],
)
def test_labels_of_every_kind_are_numbered_alike(
    tmp_path: Path, place: str, labels: list[Any], names: list[str], numbers: list[int]
) -> None:
    source = PLACES[place](tmp_path, label=labels)
    data = HFDataset(source, val_fraction=0.3, **COMMON)
    assert data.class_names == names
    whole = HFDataset(source, **COMMON).train_source
    assert whole.labels().tolist() == numbers  # type: ignore[union-attr]
    assert [whole.read_row(i).label for i in range(4)] == numbers


def test_numbers_in_csv_may_be_written_as_floats(tmp_path: Path) -> None:
    """As pandas writes a column of whole numbers in which one is missing."""
    write_images(tmp_path, [f"{i}.png" for i in range(4)])
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,10.0\n1.png,2.0\n2.png,\n3.png,0.0\n")
    source = ImageFolder(str(tmp_path), **COMMON).train_source
    assert [source.read_row(i).label for i in range(4)] == [10, 2, None, 0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 3, 1, 2], "1 of 4 classes of .* are without a row to train on: 0"),
        ([0, None, 1, 1], "has no label: leave such rows out"),
        (["a", "", "b", "b"], "has no label: leave such rows out"),
    ],
)
def test_classes_without_rows_and_rows_without_class_are_said_before_training(
    tmp_path: Path, place: str, labels: list[Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        HFDataset(PLACES[place](tmp_path, label=labels), **COMMON).prepare_data()


def test_a_source_that_does_not_know_its_labels_has_no_empty_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    source.block_sizes, source.class_names = np.array([4]), ("disc", "square")
    data = HFDataset("unread", **COMMON)
    monkeypatch.setitem(vars(data), "train_source", source)
    monkeypatch.setitem(vars(data), "val_source", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageDataModule.prepare_data(data)


def test_held_out_identities_are_numbered_as_the_training_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", label=[2024000017, 5, 2024000017, 5], part=["a", "a", "b", "b"])
    data = HFDataset(file, where={"part": "a"}, val_where={"part": "b"}, **COMMON)
    assert data.val_source is not None
    assert data.val_source.labels().tolist() == [1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", [0.5, 1.0], r"labels that are neither texts nor whole numbers, such as 0\.5"),
        ("label", [[1], [2]], r"labels that are neither texts nor whole numbers, such as \[1\]"),
        ("text", [3, 4], "no texts|holds values of the type int64, and no texts"),
        ("text", [{"a": 1}, {"a": 2}], "a struct of a|holds values of the type struct.*, and no texts"),
        ("text", [[[1]], [[2]]], "no texts, such as 1|holds values of the type list.*, and no texts"),
    ],
)
def test_values_that_are_no_labels_or_captions_are_said(
    tmp_path: Path, place: str, column: str, values: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        HFDataset(PLACES[place](tmp_path, **{column: values}), **COMMON).train_source  # noqa: B018


def test_labels_of_mixed_kinds_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixes texts and numbers in its labels, such as 'cat' and 1"):
        HFDataset(as_folder(tmp_path / "x", label=["cat", 1]), **COMMON).train_source  # noqa: B018


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "told",
    [
        [[{"raw": f"a cat {i}", "sentid": i}, {"raw": "again", "sentid": 9}] for i in range(3)],
        [{"raw": [f"a cat {i}", "again"], "sentid": [i, 9]} for i in range(3)],
        [[[f"a cat {i}"], ["again"]] for i in range(3)],
    ],
    ids=["list of structs", "struct of lists", "list of lists"],
)
def test_captions_in_structs_and_in_lists(tmp_path: Path, place: str, told: list[Any]) -> None:
    source = HFDataset(PLACES[place](tmp_path, sentences=told), **COMMON).train_source
    assert [source.read_row(i).captions for i in range(3)] == [(f"a cat {i}", "again") for i in range(3)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["0.png", "1.png"], "holds paths, URLs or base64 texts, and no encoded images"),
        ([[[0, 1]], [[2, 3]]], "holds values of the type list.*, and no encoded images"),
    ],
)
def test_image_columns_of_something_else_are_said(tmp_path: Path, column: list[Any], message: str) -> None:
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        HFDataset(str(tmp_path / "x.parquet"), **COMMON).train_source  # noqa: B018


def test_the_only_column_of_images_needs_no_usual_name(tmp_path: Path) -> None:
    images = {"image": ["0.png", "1.png"], "pixel_values": [image_bytes(i) for i in range(2)]}
    for columns in (images, {"pixel_values": images["pixel_values"]}):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        source = HFDataset(str(tmp_path / "x.parquet"), **COMMON).train_source
        assert rows_of(source) == [(image_bytes(0), None), (image_bytes(1), None)]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_json_beside_images_holds_captions_and_labels(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path / "p", [f"{i}.png" for i in range(3)])
    for i in range(3):
        (folder / f"{i}.json").write_text(json.dumps({"caption": f"a cat {i}", "label": "ab"[i % 2], "width": 20}))
    data = HFDataset(str(folder) if kind == "folder" else packed(folder, kind), **COMMON)
    records = [data.train_source.read_row(i) for i in range(3)]
    assert [(r.label, r.captions) for r in records] == [(i % 2, (f"a cat {i}",)) for i in range(3)]
    assert "captions: the field caption of the files .json" in data.decision


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_caption_file_in_another_encoding_is_named(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path / "p", ["0.png", "1.png", "2.png"])
    (folder / "0.txt").write_bytes("Gruß".encode("utf-16"))
    (folder / "1.txt").write_bytes("Gruß".encode("latin-1"))
    (folder / "2.txt").write_bytes("Gruß".encode("utf-8-sig"))
    data = HFDataset(str(folder) if kind == "folder" else packed(folder, kind), **COMMON)
    with pytest.warns(UserWarning, match=r"1\.txt is no text in UTF-8"):
        captions = {c for b in data.train_dataloader() for c in b["caption"]}
    assert captions == {"Gruß"}


@pytest.mark.filterwarnings("error")
def test_every_sample_of_a_tar_has_its_own_suffix(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "p", [f"{i}.{s}" for i, s in enumerate(["jpg", "png", "JPG", "webp"])])
    data = HFDataset(packed(folder, "tar"), **COMMON)
    assert [image for image, _ in rows_of(data.train_source)] == [image_bytes(i) for i in range(4)]


def test_names_in_a_tar_may_have_dots(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "p", [f"v1.{i}.png" for i in range(3)])
    for i in range(3):
        (folder / f"v1.{i}.txt").write_text(f"a cat {i}")
    source = HFDataset(packed(folder, "tar"), **COMMON).train_source
    assert [source.read_row(i).captions for i in range(3)] == [(f"a cat {i}",) for i in range(3)]


@pytest.mark.parametrize(("first", "used"), [("mask", 3), ("depth", 0)])
def test_parts_of_a_sample_with_names_of_their_own(tmp_path: Path, first: str, used: int) -> None:
    """`0.image.png` and `0.mask.png` are two images of one sample, not two samples."""
    names = {"mask": "image", "depth": "rgb"}
    folder = write_images(tmp_path / "p", [f"{i}.{part}.png" for part in (first, names[first]) for i in range(3)])
    for i in range(3):
        (folder / f"{i}.label.cls").write_text(str(i))
    file = packed(folder, "tar")
    if first == "depth":
        with pytest.raises(UserError, match=r"its columns are depth\.png, cls, rgb\.png|its columns are cls, depth"):
            HFDataset(file, **COMMON).train_source  # noqa: B018
    options = {"image": "depth.png", "label": "label.cls"} if first == "depth" else {}
    assert rows_of(HFDataset(file, **options, **COMMON).train_source) == [(image_bytes(used + i), i) for i in range(3)]


@pytest.mark.parametrize(
    ("train", "held_out"), [("train2017", "val2017"), ("Train", "Test_Images"), ("train-set", "dev")]
)
def test_folders_that_are_splits(tmp_path: Path, train: str, held_out: str) -> None:
    data = ImageFolder(
        str(write_images(tmp_path / "p", [f"{s}/{i}.png" for s in (train, held_out) for i in range(3)])), **COMMON
    )
    assert (len(data.train_source), len(data.val_source or ()), data.class_names) == (3, 3, [])


def test_space_around_labels_means_nothing(tmp_path: Path) -> None:
    table = pa.table({"image": [image_bytes(i) for i in range(4)], "label": ["cat", " cat", "dog", "dog "]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = HFDataset(str(tmp_path / "x.parquet"), **COMMON).train_source
    assert (source.class_names, [source.read_row(i).label for i in range(4)]) == (["cat", "dog"], [0, 0, 1, 1])


# ---- held out


def test_every_class_keeps_a_row_and_two_are_held_out() -> None:
    names = [f"{i}.png" for i in range(13)]
    labels = np.array([0] * 12 + [1])
    out = held_out(names, 0.1, labels)
    assert out.sum() == 2
    assert not out[12]
    assert held_out(names[:8], 0.1).sum() == 2
    assert not held_out(names[:3], 0.1).any()
    lone = held_out(names, 0.999, np.arange(13) % 5)
    assert set(np.arange(13)[~lone] % 5) == set(range(5))
    many = [str(i) for i in range(2000)]  # where there are enough, the hash of the name alone decides
    assert (held_out(many, 0.1)[:500] == held_out(many[:500], 0.1)).all()


# ---- channels and deep values


def encoded(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_images_of_any_number_of_channels(tmp_path: Path) -> None:
    """Grey, RGB with transparency and eight bands of 12 bits, from folders, tables and tar files: the same pixels."""
    bands = np.random.default_rng(0).integers(0, 4096, (3, 8, 8, 8)).astype(np.uint16)
    (tmp_path / "p").mkdir()
    for i in range(3):
        (tmp_path / "p" / f"{i}.npy").write_bytes(encoded(bands[i]))
    pq.write_table(pa.table({"image": [encoded(b) for b in bands]}), tmp_path / "x.parquet")
    want = np.rint(bands.transpose(0, 3, 1, 2) * (255 / 4095)).astype(np.uint8)
    for place in (str(tmp_path / "p"), str(tmp_path / "x.parquet"), packed(tmp_path / "p", "tar")):
        data = HFDataset(place, flip=False, channels=8, **COMMON)
        with pytest.warns(UserWarning, match="0 becomes black and 4095 white"):
            batch = next(iter(data.val_dataloader() or data.one_pass("train")))
        assert np.array_equal(batch["image"].numpy(), want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = HFDataset(place, flip=False, **COMMON)
            with pytest.raises(UserError, match="8 channels, expected 3: set channels"):
                next(iter(data.train_dataloader()))


def tiff(bands: np.ndarray[Any, Any]) -> bytes:
    """A little-endian TIFF of one plain strip, by its specification."""
    height, width, count = bands.shape
    raw, each = bands.tobytes(), struct.pack(f"<{count}H", *[16] * count)
    at = 8 + len(each)
    tags = [(256, 1, width), (257, 1, height), (258, count, 8), (259, 1, 1), (262, 1, 1), (273, 1, at), (277, 1, count)]
    tags += [(278, 1, height), (279, 1, len(raw)), (284, 1, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 3 if tag == 258 else 4, n, value) for tag, n, value in tags)
    head = b"II*\0" + struct.pack("<I", at + len(raw))
    return head + each + raw + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.filterwarnings("ignore:the images of")
def test_a_tiff_of_more_bands_than_pillow_reads(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 10_000, (8, 8, 5)).astype(np.uint16)
    (tmp_path / "0.tif").write_bytes(tiff(bands))
    images = next(iter(ImageFolder(str(tmp_path), channels=5, **COMMON).one_pass("train")))["image"]
    assert np.array_equal(images[0].numpy(), np.rint(bands.transpose(2, 0, 1) * (255 / 16383)).astype(np.uint8))


@pytest.mark.filterwarnings("ignore:the images of")
def test_the_value_range_is_one_for_all_and_kept_by_a_resume(tmp_path: Path) -> None:
    dark, bright = (np.full((8, 8), v, np.uint16) for v in (200, 4000))
    for i in range(4):
        (tmp_path / f"{i}.npy").write_bytes(encoded(bright if i == 3 else dark))
    data = ImageFolder(str(tmp_path), channels=1, **COMMON)
    images = next(iter(data.one_pass("train")))["image"]
    assert images[:, 0, 0, 0].tolist() == [12, 12, 12, 249]
    said = ImageFolder(str(tmp_path), channels=1, value_range=(0, 8000), **COMMON)
    assert next(iter(said.one_pass("train")))["image"][3].max() == 128
    said.load_state_dict(data.state_dict())
    assert next(iter(said.one_pass("train")))["image"][3].max() == 249


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.zip", "images/x.png"])
@pytest.mark.parametrize(
    ("content", "what"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"), (b"<!DOCTYPE html>", "a web page")],
)
def test_what_was_downloaded_in_place_of_data_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content * 2)
    with pytest.raises(UserError, match=rf"x\.{file.suffix[1:]}'?.* {what}"):
        next(iter(HFDataset(str(file.parent if "/" in name else file), **COMMON).train_dataloader()))


def test_files_that_say_nothing_here_are_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "kaggle", ["train/0.png", "train/1.png"])
    (folder / "train.csv").write_text("id,label\n0.png,1\n")
    for name in ("0.xml", "1.xml", "0.txt"):
        (folder / "train" / name).write_text("{}")
    assert "not read: train.csv, 2 .xml;" in HFDataset(str(folder), **COMMON).decision
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "0.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images .* found 0\.heic"):
        HFDataset(str(tmp_path / "phone"), **COMMON).prepare_data()


def test_the_page_of_a_data_set_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffzoo.data.resolve._published", lambda *given: given)
    for page in ("https://huggingface.co/datasets/owner/name/tree/v1", "hf://datasets/owner/name@v1"):
        assert resolve(page) == ("owner/name", None, "v1")


def test_validation_alone_of_data_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    """`fit` goes on without, `validate` would end in silence."""
    data = ImageFolder(str(write_images(tmp_path, ["a.png", "b.png"])), **COMMON)
    for fn in ("fit", "validate"):
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=fn))
        if fn == "fit":
            assert data.val_dataloader() == []
        else:
            with pytest.raises(UserError, match="holds no images out: set val_path or val_fraction"):
                data.val_dataloader()
