"""Published data sets, served by a Hub in memory to the real clients, with its faults."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from data.stand_ins import image_bytes, rows, signature, uneven_shards, write_parquet
from hub_server import FakeHub

from diffzoo.data import Cifar10, Coco, HFDataset, ImageNet
from diffzoo.data.sources import Source
from diffzoo.errors import UserError
from diffzoo.training.resume import check_class_order, check_data

NAME = "owner/shards"
COMMON = {"image_size": 8, "batch_size": 8, "num_workers": 0}
STREAM = {**COMMON, "shuffle_window": 32, "lanes": 16}


def publish(hub: FakeHub, folder: Path, name: str = NAME, **settings) -> str:
    """The uneven shards as a training split, the first again as validation; the commit."""
    folder.mkdir(exist_ok=True)
    files = {f"data/train-{k:05d}.parquet": Path(f).read_bytes() for k, f in enumerate(uneven_shards(folder))}
    files["data/validation-00000.parquet"] = files["data/train-00000.parquet"]
    return hub.add_repo(name, files, "dataset", **settings)


@pytest.fixture(autouse=True)
def _few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are so small that one request fetches all; opening them anew makes the client ask again."""
    monkeypatch.setattr("diffzoo.data.parquet.OPEN_FILES", 1)


def walk(data: HFDataset, steps: int) -> list[tuple]:
    return [s for _, batch in zip(range(steps), data.train_dataloader(), strict=False) for s in signature(batch)]


def test_streaming_and_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    commit = publish(hub, tmp_path / "files")
    streamed = HFDataset(NAME, caption="captions", **STREAM)
    assert (len(streamed.train_source), len(streamed.val_source)) == (150, 67)
    assert streamed.train_source.revision == commit
    assert streamed.num_classes == 3
    assert streamed.has_captions
    assert streamed.train_source.remote
    seen = walk(streamed, 18)
    assert len({s[1] for s in seen}) == 144
    fetched = HFDataset(NAME, caption="captions", streaming=False, **COMMON)
    assert not fetched.train_source.remote
    assert {s[1] for s in walk(fetched, 18)} <= set(range(150))
    local = HFDataset(str(tmp_path / "files"), caption="captions", val_split=None, **COMMON)
    assert walk(local, 18) == walk(HFDataset(NAME, caption="captions", streaming=False, **COMMON), 18)


def test_each_row_group_is_fetched_once(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "files")
    data = HFDataset(NAME, caption="captions", **STREAM)
    read: list[int] = []
    plain = data.train_source.read_block
    data.train_source.read_block = lambda block: read.append(block) or plain(block)
    walk(data, 18)
    blocks = len(data.train_source.block_sizes)
    assert len(set(read)) >= blocks - 1
    assert len(read) < 3 * blocks  # 16 lanes cut 10 row groups: most are read by two lanes, none by more than needed


def test_the_index_is_read_once(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "files")
    len(HFDataset(NAME, **STREAM).train_source)
    before = len(hub.log)
    len(HFDataset(NAME, **STREAM).train_source)
    assert len(hub.log) - before < before


def test_a_failing_server_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    """429 and 503 in mid-stream change nothing of what is shown."""
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 18)
    data = HFDataset(NAME, caption="captions", **STREAM)
    loader = iter(data.train_dataloader())
    seen = signature(next(loader))
    hub.fail("/_lfs/", status=503, times=3)
    hub.fail("/_lfs/", status=429, times=2)
    for _, batch in zip(range(17), loader, strict=False):
        seen += signature(batch)
    assert seen == expected
    assert not any(fault.times for fault in hub.faults), "the server did fail"


def test_a_connection_that_is_cut_is_taken_up_again(hub: FakeHub, tmp_path: Path) -> None:
    """In mid-stream, in the middle of a file: nothing of what is shown changes."""
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 18)
    data = HFDataset(NAME, caption="captions", **STREAM)
    loader = iter(data.train_dataloader())
    seen = signature(next(loader))
    hub.cut("/_lfs/", after=1000, times=3)
    hub.fail("/_lfs/", status=408, times=1)
    for _, batch in zip(range(17), loader, strict=False):
        seen += signature(batch)
    assert seen == expected
    assert not any(fault.times for fault in hub.faults), "the connection was cut"


def test_a_dead_server_stops_the_run_clearly_and_exactly(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 18)
    data = HFDataset(NAME, caption="captions", **STREAM)
    seen: list[tuple] = []

    def run() -> None:
        for step, batch in enumerate(data.train_dataloader()):
            seen.extend(signature(batch))
            if step == 2:
                hub.fail("/_lfs/", status=503)

    with pytest.raises(UserError, match=r"could not read .* in 3 attempts .* goes on exactly from its last"):
        run()
    hub.faults.clear()
    again = HFDataset(NAME, caption="captions", **STREAM)
    again.load_state_dict(data.state_dict())
    assert seen + walk(again, 18 - len(seen) // 8) == expected


def test_the_checkpoint_pins_the_revision(hub: FakeHub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "files")
    expected = walk(HFDataset(NAME, caption="captions", **STREAM), 10)
    data = HFDataset(NAME, caption="captions", **STREAM)
    seen = walk(data, 4)
    write_parquet(tmp_path / "new.parquet", rows(500, 67), 16)
    hub.add_repo(NAME, {"data/train-00000.parquet": (tmp_path / "new.parquet").read_bytes()}, "dataset")
    again = HFDataset(NAME, caption="captions", **STREAM)
    again.load_state_dict(data.state_dict())
    assert seen + walk(again, 6) == expected
    moved = HFDataset(NAME, caption="captions", revision="main", **STREAM)
    with pytest.raises(UserError, match="no longer what the checkpoint was trained on"):
        moved.load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "owner/missing"},
            "no data set 'owner/missing' on the Hub, or it is private, and there is no file or folder 'owner/missing'",
        ),
        ({"source": "owner/closed"}, "is gated: accept its conditions .* `hf auth login`"),
        ({"source": "owner/empty"}, "holds no data files"),
        ({"revision": "v9"}, "has no revision 'v9'"),
        ({"split": "trian"}, "no split 'trian'; did you mean 'train'"),
        ({"val_split": "devel"}, "no split 'devel'"),
        ({"image": "pixels"}, "no image column 'pixels' in owner/shards; its columns are image, label, captions, row"),
        ({"label": "lable"}, "no label column 'lable' .* did you mean 'label'"),
        ({"caption": "title"}, "no caption column 'title'"),
        ({"where": {"splt": "train"}}, "no filter column 'splt'"),
        ({"where": {"row": -5}}, "no row of owner/shards has row = -5"),
        ({"source": "./nowhere"}, "no file or folder './nowhere'"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(hub: FakeHub, tmp_path: Path, settings: dict, message: str) -> None:
    publish(hub, tmp_path / "files")
    hub.add_repo("owner/closed", {"data/train-0.parquet": b"x"}, "dataset", gated=True)
    hub.add_repo("owner/empty", {"README.md": b"# nothing"}, "dataset")
    data = HFDataset(**{"source": NAME, **settings}, **COMMON)
    with pytest.raises(UserError, match=message):
        _ = data.train_source, data.val_source


def shard(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, parts in samples:
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples(first: int, count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"{i:04d}", {"png": image_bytes(i), "cls": str(i % 3).encode(), "txt": f"number {i}\nalso {i}".encode()})
        for i in range(first, first + count)
    ]


def test_fields_of_json_in_webdataset_are_columns(hub: FakeHub, tmp_path: Path) -> None:
    told = [{"caption": f"number {i}", "class": ["cat", "dog"][i % 2], "url": "x" * 99} for i in range(9)]
    parts = [(f"{i:04d}", {"png": image_bytes(i), "json": json.dumps(told[i]).encode()}) for i in range(9)]
    hub.add_repo("owner/json", {"train-0.tar": shard(parts)}, "dataset")
    (tmp_path / "x.tar").write_bytes(shard(parts))
    for source in (HFDataset(str(tmp_path / "x.tar"), **COMMON), HFDataset("owner/json", **STREAM)):
        found = source.train_source
        assert found.class_names == ["cat", "dog"]
        assert found.labels().tolist() == [i % 2 for i in range(9)]
        assert [found.read_row(i).captions for i in range(9)] == [(f"number {i}",) for i in range(9)]
    assert HFDataset(str(tmp_path / "x.tar"), caption="json", **COMMON).train_source.read_row(3).captions == (
        "number 3",
    )
    both = [(name, {**p, "txt": b"of the text", "json": b"{"}) for name, p in parts[:1]] + parts[1:]
    (tmp_path / "y.tar").write_bytes(shard(both))  # one is no JSON
    assert HFDataset(str(tmp_path / "y.tar"), label=None, **COMMON).train_source.read_row(0).captions == (
        "of the text",
    )
    broken = HFDataset(str(tmp_path / "y.tar"), label=None, caption="caption", **COMMON).train_source
    assert broken.read_row(0).image is None
    assert broken.read_row(1).captions == ("number 1",)
    with pytest.raises(UserError, match=r"no caption column 'captoin'.*did you mean 'caption'"):
        HFDataset(str(tmp_path / "x.tar"), caption="captoin", **COMMON).prepare_data()


def test_webdataset_local_and_streamed(hub: FakeHub, tmp_path: Path) -> None:
    shards = {f"train-{k}.tar": shard(samples(100 * k, 70 - 20 * k)) for k in range(3)}
    hub.add_repo("owner/tars", shards, "dataset")
    folder = tmp_path / "tars"
    folder.mkdir()
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    streamed, local = HFDataset("owner/tars", **STREAM), HFDataset(str(folder), **COMMON)
    for data in (streamed, local):
        assert len(data.train_source) == 150
        assert data.num_classes == 3
        batch = next(iter(data.train_dataloader()))
        for row, label, caption in zip(batch["id"].tolist(), batch["label"].tolist(), batch["caption"], strict=True):
            number = int(caption.split()[1])
            assert label == number % 3
            assert data.train_source.read_row(row).captions[0] == f"number {number}"
    streamed.set_position(0)
    assert len({s[1] for s in walk(streamed, 18)}) == 144
    with pytest.raises(UserError, match=r"no label column 'label' .* its columns are cls, png, txt"):
        _ = HFDataset("owner/tars", label="label", **COMMON).train_source
    (folder / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="is no tar file"):
        _ = HFDataset(str(folder), **COMMON).train_source


def test_image_files_on_the_hub(hub: FakeHub) -> None:
    files = {f"train/{'cat' if i % 2 else 'dog'}/{i}.png": image_bytes(i) for i in range(20)}
    hub.add_repo("owner/images", files, "dataset")
    data = HFDataset("owner/images", val_split=None, **COMMON)
    assert data.class_names == ["cat", "dog"]
    seen = list(data.train_dataloader())
    assert sum(len(b["id"]) for b in seen) == 16


@pytest.mark.parametrize("module", [ImageNet, Coco, Cifar10])
def test_named_sets_are_column_mappings(module: type, tmp_path: Path) -> None:
    files = uneven_shards(tmp_path)
    extra = {"caption": "captions"} if module is Coco else {}
    data = module(files[0], **{**COMMON, **extra})
    batch = next(iter(data.train_dataloader()))
    assert ("label" in batch) == (module is not Coco)
    assert ("caption" in batch) == (module is Coco)
    assert isinstance(data.train_source, Source)


def test_threads_that_read_one_source_close_no_file_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are fetched ahead in a thread while training reads others of the same files."""
    monkeypatch.setattr("diffzoo.data.tables.RESIDENT_BYTES", 0)
    data = HFDataset(str(tmp_path), caption="captions", val_split=None, **COMMON)
    uneven_shards(tmp_path)
    source = data.train_source
    assert not source.random_access
    blocks = [b for _ in range(15) for b in range(len(source.block_sizes))]

    def read(block: int) -> list[bytes | None]:
        return [record.image for record in source.read_block(block)]

    want = {b: read(b) for b in set(blocks)}
    with ThreadPoolExecutor(4) as pool:
        assert all(got == want[b] for b, got in zip(blocks, pool.map(read, blocks), strict=True))


def test_a_run_under_the_former_name_goes_on() -> None:
    """`HFDataset` had another name, under which checkpoints of earlier versions hold its position."""
    data = HFDataset("anything")
    trainer = SimpleNamespace(training=True, datamodule=data)
    checkpoint = {"diffzoo": {"data": "HubImages"}, "HubImages": {"images_seen": 8}}
    check_data(trainer, checkpoint)
    assert checkpoint["HFDataset"] == {"images_seen": 8}
    trainer.datamodule = Cifar10()
    with pytest.raises(UserError, match="this run was trained on HubImages, and its position in it means nothing in"):
        check_data(trainer, {"diffzoo": {"data": "HubImages"}})


def test_the_same_classes_in_another_order_are_no_resume() -> None:
    with pytest.raises(UserError, match=r"another order, 1, 10, 2 … .*class_names to \[1, 10, 2\]"):
        check_class_order(["1", "10", "2"], ["1", "2", "10"])
