"""Sources that are damaged, changed, numbered otherwise or described beside the images: said, refused or right."""

import gc
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.stand_ins import image_bytes, rows, signature, uneven_shards, write_images, write_parquet
from data.test_datasets import COMMON, NAME, STREAM, publish, samples, shard, walk
from hub_server import FakeHub

from diffzoo.data import HFDataset, ImageFolder
from diffzoo.data.metadata import Columns
from diffzoo.data.remote import retried
from diffzoo.data.tables import TableSource
from diffzoo.data.tar import TarSource
from diffzoo.errors import UserError


def parquet(path: Path, **columns: list[Any]) -> str:
    """A Parquet file of images and other columns."""
    count = len(next(iter(columns.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": image_bytes(i), "path": None} for i in range(count)]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=4)
    return str(path)


# ---- what identifies a source


def test_a_file_with_other_images_and_as_many_rows_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, rows(0, 48), 16)
    data = HFDataset(str(path), caption="captions", **COMMON)
    walk(data, 2)
    state = data.state_dict()
    os.utime(path, (1, 1))  # the time of a file is no part of it
    HFDataset(str(path), caption="captions", **COMMON).load_state_dict(state)
    write_parquet(path, rows(500, 48), 16)
    with pytest.raises(UserError, match="no longer what the checkpoint was trained on"):
        HFDataset(str(path), caption="captions", **COMMON).load_state_dict(state)


def test_a_file_that_changes_under_an_open_source_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, rows(0, 48), 16)
    source = TableSource([str(path)], Columns(), "x")
    write_parquet(path, rows(500, 48), 16)
    with pytest.raises(UserError, match="has changed since it was indexed"):
        source.read_block(0)


def test_the_same_files_elsewhere_are_the_same_source(tmp_path: Path) -> None:
    prints: dict[str, set[str]] = {"parquet": set(), "tar": set(), "folder": set()}
    for place in ("here", "there/on"):
        base = tmp_path / place
        base.mkdir(parents=True)
        files = uneven_shards(base)
        prints["parquet"].add(TableSource(files, Columns(), "x").rows_hash)
        for k in range(2):
            (base / f"{k}.tar").write_bytes(shard(samples(10 * k, 5)))
        prints["tar"].add(TarSource([str(base / f"{k}.tar") for k in range(2)], Columns(), "x").rows_hash)
        folder = write_images(base / "p", ["a/1.png", "b/2.png"])
        prints["folder"].add(ImageFolder(str(folder), **COMMON).train_source.rows_hash)
    assert [len(p) for p in prints.values()] == [1, 1, 1]


def test_a_tar_with_another_label_or_image_is_another_source(tmp_path: Path) -> None:
    prints = set()
    for change in ({}, {"cls": b"7"}, {"png": image_bytes(99)}):
        changed = samples(0, 5)
        changed[2][1].update(change)
        (tmp_path / "x.tar").write_bytes(shard(changed))
        os.utime(tmp_path / "x.tar", (len(prints), len(prints)))
        prints.add(TarSource([str(tmp_path / "x.tar")], Columns(), "x").rows_hash)
    assert len(prints) == 3


@pytest.mark.parametrize("window", [32, 1000])
@pytest.mark.parametrize("streamed_first", [True, False])
def test_a_run_goes_on_with_the_files_downloaded_or_streamed(
    hub: FakeHub, tmp_path: Path, window: int, streamed_first: bool
) -> None:
    """The same images in the same order, where everything fits the window and where lanes walk through blocks."""
    publish(hub, tmp_path / "files")
    settings = {**STREAM, "shuffle_window": window, "caption": "captions"}
    first, then = ({"streaming": flag} for flag in (streamed_first, not streamed_first))
    expected = walk(HFDataset(NAME, **settings, **first), 18)
    data = HFDataset(NAME, **settings, **first)
    seen = walk(data, 7)
    again = HFDataset(NAME, **settings, **then)
    assert again.train_source.remote != streamed_first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.load_state_dict(data.state_dict())
        seen += walk(again, 11)
    assert seen == expected


@pytest.mark.parametrize("kind", ["tar", "png"])
def test_tar_and_image_files_are_the_same_streamed_and_downloaded(hub: FakeHub, kind: str) -> None:
    files = {f"train/{'cat' if i % 2 else 'dog'}/{i}.png": image_bytes(i) for i in range(20)}
    if kind == "tar":
        files = {f"train-{k}.tar": shard(samples(10 * k, 10)) for k in range(2)}
    hub.add_repo("owner/set", files, "dataset")
    sources = [HFDataset("owner/set", val_split=None, streaming=s, **COMMON).train_source for s in (True, False)]
    assert [s.remote for s in sources] == [True, False]
    assert sources[0].rows_hash == sources[1].rows_hash
    assert [sources[0].read_row(i).image for i in range(20)] == [sources[1].read_row(i).image for i in range(20)]


# ---- damage


def test_damaged_files_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("nothing on a disk gets better by waiting"))
    monkeypatch.setattr("diffzoo.data.tables.RESIDENT_BYTES", 0)
    names = ["image", "label"]
    for k in range(2):
        parquet(tmp_path / f"{k}.parquet", label=[i % 3 for i in range(12)])
    whole = (tmp_path / "1.parquet").read_bytes()

    def opened() -> TableSource:
        return TableSource([str(tmp_path / f"{k}.parquet") for k in range(2)], Columns(*names), "x")

    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    nonsense = whole[:footer] + b"\xff" * 60 + whole[footer + 60 :]
    for content, what in ((b"", "is empty"), (whole[:700], "is truncated"), (nonsense, "is damaged")):
        for k in (0, 1):
            (tmp_path / f"{k}.parquet").write_bytes(content)
            with pytest.raises(UserError, match=rf"{k}\.parquet {what} .*write or fetch it again"):
                HFDataset(str(tmp_path), **COMMON).train_source  # noqa: B018
            (tmp_path / f"{k}.parquet").write_bytes(whole)
    metadata = pq.read_metadata(tmp_path / "1.parquet")
    at = metadata.row_group(1).column(0).data_page_offset
    (tmp_path / "1.parquet").write_bytes(whole[:at] + bytes(600) + whole[at + 600 :])
    source = opened()
    with pytest.raises(UserError, match=r"1\.parquet is damaged \(.*\): write or fetch it again"):
        [list(source.read_block(b)) for b in range(len(source.block_sizes))]
    source = opened()
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot read .*0\.parquet \(FileNotFoundError"):
        source.read_block(0)


def test_an_empty_shard_is_no_fault_and_an_empty_set_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [], 4)
    with pytest.raises(UserError, match=f"no images are left to train on in {tmp_path}"):
        HFDataset(str(tmp_path), **COMMON).train_source  # noqa: B018
    write_parquet(tmp_path / "1.parquet", rows(0, 16), 4)
    data = HFDataset(str(tmp_path), caption="captions", **COMMON)
    assert len({s[1] for s in walk(data, 2)}) == 16
    assert data.train_source.labels().tolist() == [i % 3 for i in range(16)]


@pytest.mark.parametrize("missing", ["label", "image"])
def test_a_later_shard_without_a_column_is_named(tmp_path: Path, missing: str) -> None:
    parquet(tmp_path / "0.parquet", label=[0, 1])
    table = pq.read_table(parquet(tmp_path / "1.parquet", label=[0, 1], extra=["a", "b"])).drop_columns([missing])
    pq.write_table(table, tmp_path / "1.parquet")
    rest = ", ".join(c for c in ("image", "label", "extra") if c != missing)
    with pytest.raises(UserError, match=rf"no {missing} column '{missing}' in .*1\.parquet; its columns are {rest}"):
        HFDataset(str(tmp_path), **COMMON).train_source  # noqa: B018


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_whose_classes_are_numbered_otherwise_are_refused(tmp_path: Path, kind: str) -> None:
    """`load_dataset` takes the first file's names for all, so that cats become dogs (findings/)."""

    def written(number: int, names: list[str]) -> str:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [{"bytes": image_bytes(i), "path": None} for i in range(2)]
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        path = str(tmp_path / f"{number}.{kind}")
        if kind == "parquet":
            rows.to_parquet(path)
        else:
            table = rows.data.table
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        return path

    cats, same, dogs = written(0, ["cat", "dog"]), written(1, ["cat", "dog"]), written(2, ["dog", "cat"])
    assert TableSource([cats, same], Columns(label="label"), "set").class_names == ["cat", "dog"]
    with pytest.raises(UserError, match=rf"2\.{kind} has other names or another order of classes.*than .*0\.{kind}"):
        TableSource([cats, dogs], Columns(label="label"), "set")


def test_a_row_without_label_is_named(tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", label=[0, 1, 2, 1, 0, None, 1, 2])
    data = HFDataset(file, **COMMON)
    for ask in (
        data.train_source.labels,
        lambda: HFDataset(file, balance=True, **COMMON).order,
        lambda: next(iter(data.train_dataloader())),
    ):
        with pytest.raises(UserError, match=r"x\.parquet row 1 of row group 1 has no label: leave"):
            ask()


@pytest.mark.parametrize("labels", [[[1, 2], [3]], ["ant", None]])
def test_labels_that_are_no_single_class(tmp_path: Path, labels: list[Any]) -> None:
    source = HFDataset(parquet(tmp_path / "x.parquet", label=labels), **COMMON)
    with pytest.raises(UserError, match=r"neither texts nor whole numbers|has no label"):
        source.train_source.labels()


# ---- classes of held-out rows


def class_sets(kind: str, folder: Path, held_out: list[str]) -> str:
    """Training images of ant, bee and cow, and held-out ones."""
    for split, classes in (("train", ["ant", "bee", "cow"]), ("validation", held_out)):
        if kind == "texts":
            parquet(folder / f"{split}.parquet", label=classes)
        elif kind == "names":
            file = parquet(folder / f"{split}.parquet", label=list(range(len(classes))))
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
            pq.write_table(pq.read_table(file).cast(features.arrow_schema), file)
        elif kind == "metadata":
            write_images(folder / split, [f"{c}.png" for c in classes])
            lines = [json.dumps({"file_name": f"{c}.png", "label": c}) for c in classes]
            (folder / split / "metadata.jsonl").write_text("\n".join(lines))
        else:
            write_images(folder / split, [f"{c}/1.png" for c in classes])
    return str(folder)


@pytest.mark.parametrize("kind", ["texts", "names", "folders", "metadata", "hub"])
def test_held_out_rows_are_numbered_as_training_rows(hub: FakeHub, tmp_path: Path, kind: str) -> None:
    def opened(held_out: list[str]) -> HFDataset:
        place = class_sets(kind, tmp_path / held_out[0], held_out)
        if kind == "hub":
            files = {str(p.relative_to(place)): p.read_bytes() for p in Path(place).rglob("*.png")}
            place = f"owner/{held_out[0]}"
            hub.add_repo(place, files, "dataset")
        return HFDataset(place, **COMMON)

    data = opened(["ant", "cow"])
    assert data.class_names == data.val_source.class_names == ["ant", "bee", "cow"]
    assert data.val_source.labels().tolist() == [0, 2]
    assert [label for b in data.val_dataloader() for label in b["label"].tolist()] == [0, 2]
    with pytest.raises(UserError, match="has a class 'dog', which is not among the 3 classes of the training split"):
        opened(["bee", "dog"]).val_source  # noqa: B018


@pytest.mark.parametrize("below", ["", "data/", "some/data/"])
def test_a_split_is_its_own_folder_wherever_it_lies(tmp_path: Path, below: str) -> None:
    write_images(tmp_path, [f"{below}{name}" for name in ("train/ant/1.png", "train/bee/2.png", "test/bee/3.png")])
    linked = tmp_path / f"{below}train/bee/2.png"
    linked.rename(tmp_path.parent / f"{tmp_path.name}.png")
    linked.symlink_to(tmp_path.parent / f"{tmp_path.name}.png")
    data = HFDataset(str(tmp_path), **COMMON)
    assert (data.train_source.files, data.class_names) == (["ant/1.png", "bee/2.png"], ["ant", "bee"])
    assert (data.val_source.files, data.val_source.labels().tolist()) == (["bee/3.png"], [1])


# ---- what lies beside images


def test_captions_of_a_folder_whose_first_image_has_none(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "readme.txt").write_text("no caption")
    source = ImageFolder(str(tmp_path), **COMMON).train_source
    assert source.has_captions
    assert [source.read_row(i).captions for i in range(3)] == [("",), ("one",), ("",)]
    (tmp_path / "1.txt").unlink()
    assert not ImageFolder(str(tmp_path), **COMMON).train_source.has_captions


METADATA = [("b.png", "a bee", 1), ("sub/a.png", "an ant", 0), ("c.png", "a cow, or two", 1)]


def describe(folder: Path, kind: str) -> None:
    """Metadata on three of the four images."""
    write_images(folder, ["a.png", "b.png", "c.png", "sub/a.png"])
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f, "text": t, "kind": k}) for f, t, k in METADATA]
    else:
        lines = ["file_name,text,kind", *(f'{f},"{t}",{k}' for f, t, k in METADATA)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    if kind == "parquet":
        columns = dict(zip(("file_name", "text", "kind"), map(list, zip(*METADATA, strict=True)), strict=True))
        pq.write_table(pa.table(columns), folder / "metadata.parquet")


@pytest.mark.parametrize(
    ("kind", "place"), [("jsonl", "hub"), ("csv", "local"), ("csv", "hub"), ("parquet", "local"), ("parquet", "hub")]
)
def test_metadata_is_read_as_datasets_reads_it(hub: FakeHub, tmp_path: Path, kind: str, place: str) -> None:
    folder = tmp_path / "set"
    describe(folder, kind)
    name = str(folder)
    if place == "hub":
        name = f"owner/{kind}"
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        hub.add_repo(name, files, "dataset")
    source = HFDataset(name, label="kind", class_names=["insect", "mammal"], **COMMON).train_source
    records = [source.read_row(i) for i in range(len(source))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of its reader of CSV
        theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        gc.collect()
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    expected = {(Path(row["image"]["path"]).read_bytes(), row["text"], row["kind"]) for row in theirs}
    assert {(r.image, *r.captions, r.label) for r in records} == expected
    assert len(expected) == 3
    assert source.class_names == ["insect", "mammal"]
    assert source.labels().tolist() == [r.label for r in records]
    assert not HFDataset(name, caption=None, **COMMON).train_source.has_captions
    assert HFDataset(name, **COMMON).num_classes == 0  # no column of a usual name; with metadata folders are no classes
    for wrong, message in (
        ({"caption": "title"}, "no caption column 'title' in .*its columns are text, kind"),
        ({"label": "label_"}, "no label column 'label_'"),
        ({"image": "img"}, "holds single images"),
    ):
        with pytest.raises(UserError, match=message):
            HFDataset(name, **wrong, **COMMON).train_source  # noqa: B018


def test_columns_mean_something_to_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path, ["ant/1.png", "bee/2.png"])
    (tmp_path / "ant" / "1.txt").write_text("an ant")

    def opened(**settings: Any) -> Any:
        return HFDataset(str(tmp_path), **settings, **COMMON).train_source

    assert opened(label=None).labels() is None
    assert opened(class_names=["bee", "ant"]).labels().tolist() == [1, 0]
    assert (opened().has_captions, opened(caption=None).has_captions) == (True, False)
    assert opened(label="label", caption="txt").read_row(0).captions == ("an ant",)
    with pytest.raises(UserError, match=r"no caption column 'title' in .*; its columns are label, txt"):
        opened(caption="title")
    with pytest.raises(UserError, match="has a class 'bee', which is not among the 1 classes"):
        opened(class_names=["ant"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "z.png"}', r"metadata\.jsonl of .* names 'z\.png', but there is no such image"),
        ('{"file_name": "../x.png"}', r"names '\.\./x\.png', but there is no such image"),
        ('{"file": "a.png"}', "expected rows with a column file_name"),
        ('{"file_name": "a.png"', "cannot be read .*JSONDecodeError"),
        ('["a.png"]', "expected rows with a column file_name"),
    ],
)
def test_metadata_that_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_images(tmp_path, ["x.png", "set/a.png"])
    (tmp_path / "set" / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        ImageFolder(str(tmp_path / "set"), **COMMON).train_source  # noqa: B018


def test_other_captions_are_another_source(tmp_path: Path) -> None:
    describe(tmp_path, "jsonl")
    before = ImageFolder(str(tmp_path), **COMMON).train_source.rows_hash
    text = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(text.replace("bee", "fly"))
    assert ImageFolder(str(tmp_path), **COMMON).train_source.rows_hash != before


def test_a_bad_image_is_named_the_same_in_every_process(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "3.png").write_bytes(b"no image at all")
    data = ImageFolder(str(tmp_path), **COMMON)
    with pytest.warns(UserWarning, match="skipped a bad image"):
        next(iter(data.train_dataloader()))
    reason = next(iter(data.bad_images.values()))
    assert reason.endswith("3.png: UnidentifiedImageError: no image in a format that Pillow reads")


# ---- over the network


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_in_mid_stream_says_what_to_do(hub: FakeHub, tmp_path: Path, status: int) -> None:
    publish(hub, tmp_path / "files")
    data = HFDataset(NAME, caption="captions", **STREAM)
    loader = iter(data.train_dataloader())
    next(loader)
    hub.fail("/_lfs/", status=status)
    before = len(hub.log)
    with pytest.raises(UserError, match=rf"data set {NAME} \({status}\).* accept its conditions .* `hf auth login`"):
        list(loader)
    refused = [path for _, path in hub.log[before:] if "/_lfs/" in path]
    assert len(refused) <= 2, "a refusal is not asked for again"


@pytest.mark.parametrize("change", ["gated", "private"])
@pytest.mark.parametrize("known", [True, False])
def test_a_data_set_that_is_closed_in_mid_stream(hub: FakeHub, tmp_path: Path, change: str, known: bool) -> None:
    """Whether the client still knows its files, or calls them missing because it may not see the repository."""
    publish(hub, tmp_path / "files")
    data = HFDataset(NAME, caption="captions", **STREAM)
    loader = iter(data.train_dataloader())
    next(loader)
    setattr(hub.repos["dataset", NAME], change, True)
    if not known:
        data.train_source.reader._fs._repo_and_revision_exists_cache.clear()
        data.train_source.reader._fs.invalidate_cache()
    with pytest.raises(UserError, match=rf"data set {NAME} \(401\).* accept its conditions"):
        list(loader)


class Refusal(OSError):
    def __init__(self, **headers: str):
        self.response = type("Response", (), {"status_code": 429, "headers": headers})


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("7", 7, 7), ("86400", 300, 300), ("soon", 1, 1), ("", 1, 1), ("Fri, 01 Jan 2100 00:00:00 GMT", 300, 300)],
)
def test_the_wait_that_a_server_asks_for_is_kept(
    monkeypatch: pytest.MonkeyPatch, header: str, low: float, high: float
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers = [Refusal(**{"Retry-After": header}), Refusal(), None]

    def ask() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "data"

    assert retried("x", ask) == "data"
    assert low <= waits[0] <= high
    assert waits[1:] == [2.0]


def test_labels_of_tar_shards_cost_no_requests_of_their_own(hub: FakeHub) -> None:
    hub.add_repo("owner/tars", {f"train-{k}.tar": shard(samples(100 * k, 70)) for k in range(3)}, "dataset")
    for _ in range(2):  # without and with the index on disk
        before = len(hub.log)
        source = HFDataset("owner/tars", **STREAM).train_source
        assert source.labels().tolist() == [(100 * k + i) % 3 for k in range(3) for i in range(70)]
        assert len(hub.log) - before < 40
    assert source.class_names == ["0", "1", "2"]


def test_labels_of_parquet_files_take_few_requests_and_are_kept(hub: FakeHub, tmp_path: Path) -> None:
    files = {}
    for k in range(3):
        write_parquet(tmp_path / "x.parquet", rows(100 * k, 64), 4)
        files[f"data/train-{k:05d}.parquet"] = (tmp_path / "x.parquet").read_bytes()
    hub.add_repo(NAME, files, "dataset")
    expected = [(100 * k + i) % 3 for k in range(3) for i in range(64)]
    source = HFDataset(NAME, **STREAM).train_source
    assert len(source.block_sizes) == 48
    assert source.labels().tolist() == expected
    before = len(hub.requests("/_lfs/"))
    assert before <= 15  # five for each of three files, whatever their row groups
    again = HFDataset(NAME, **STREAM).train_source
    assert again.labels().tolist() == expected
    assert len(hub.requests("/_lfs/")) - before <= 2  # the schema of the first file
    chosen = HFDataset(NAME, where={"label": 1}, **STREAM).train_source
    assert chosen.labels().tolist() == [1] * expected.count(1)


def test_small_values_between_large_images_are_read_alone(hub: FakeHub, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("diffzoo.data.parquet.SPARSE", 1000)
    pad = os.urandom(200_000)
    some = [{**row, "image": {"bytes": row["image"]["bytes"] + pad, "path": None}} for row in rows(0, 40)]
    write_parquet(tmp_path / "x.parquet", some, 4)
    data = (tmp_path / "x.parquet").read_bytes()
    hub.add_repo(NAME, {"data/train-00000.parquet": data}, "dataset")
    read: list[int] = []
    hub.on_blob = read.append
    source = HFDataset(NAME, **STREAM).train_source
    assert source.labels().tolist() == [i % 3 for i in range(40)]
    assert sum(read) < len(data) / 10


def test_two_workers_stream_what_none_streams(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 18)
    data = HFDataset(NAME, caption="captions", **{**STREAM, "num_workers": 2})
    assert walk(data, 18) == expected
    data.teardown()


def test_a_stalled_connection_is_given_up_and_taken_up_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 18)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    data = HFDataset(NAME, caption="captions", **STREAM)
    loader = iter(data.train_dataloader())
    seen = signature(next(loader))
    hub.slow("/_lfs/", seconds=1.0, times=14)  # more often than the client itself asks again
    for _, batch in zip(range(17), loader, strict=False):
        seen += signature(batch)
    assert seen == expected
    assert not any(fault.times for fault in hub.faults), "the connection stalled"
