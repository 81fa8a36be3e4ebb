"""Latent caches: what is written, resuming, several processes, refusals, and the position on them."""

import fcntl
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data.stand_ins import Recorder, Shards, quiet_trainer, rows, write_images, write_parquet
from safetensors.numpy import load_file, save_file

from diffzoo.cli.main import main
from diffzoo.data import ImageFolder, Latents
from diffzoo.data.encode import encode, make_cache_metadata
from diffzoo.data.latents import HEADER, LatentSource, open_shard, read_cache_metadata, shard_name
from diffzoo.errors import UserError
from diffzoo.images import to_float

ROWS, SHARD = 40, 12


class Halves:
    """An autoencoder that averages 2×2 pixels; the standard deviation is a function of the mean."""

    id, hash = "halves", "0" * 64

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, mean.abs() / 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [f"{('cat', 'dog')[i % 2]}/{i:03d}.png" for i in range(ROWS)]
    path = write_images(tmp_path / "images", names)
    for i, name in enumerate(names):
        (path / name).with_suffix(".txt").write_text(f"one {i}\ntwo {i}")
    return path


def pixels(folder: Path, **settings) -> ImageFolder:
    return ImageFolder(str(folder), **{"image_size": 8, "batch_size": 8, "num_workers": 0, **settings})


def make(folder: Path, out: Path, autoencoder=None, flips: int = 2, **settings):
    data = pixels(folder)
    autoencoder = autoencoder or Halves()
    cache_metadata = make_cache_metadata(data.train_source, data.transform, flips, autoencoder, SHARD)
    return encode(data.train_source, out / "train", data.transform, autoencoder.encode, cache_metadata, 5, **settings)


def latents(out: Path, **settings) -> Latents:
    return Latents(str(out), **{"image_size": 4, "batch_size": 8, "num_workers": 0, **settings})


def test_the_cache_holds_what_the_pixels_give(folder: Path, tmp_path: Path) -> None:
    """Same order, labels, captions and flips as the pixel module; moments are those of its images."""
    done = make(folder, tmp_path / "cache")
    assert (done.encoded, done.present, done.elsewhere, done.bad) == (4, 0, 0, {})
    for raw, cached in zip(
        [b for _ in range(2) for b in pixels(folder).train_dataloader()],
        [b for _ in range(2) for b in latents(tmp_path / "cache").train_dataloader()],
        strict=True,
    ):
        moments = torch.cat(Halves().encode(to_float(raw["image"])), dim=1)
        assert torch.allclose(cached["moments"].float(), moments, atol=1e-3)
        assert cached["moments"].dtype == torch.float16
        for name in ("label", "index"):
            assert torch.equal(raw[name], cached[name])
        assert raw["caption"] == cached["caption"]
        assert raw["id"].tolist() == cached["id"].tolist()


def test_a_killed_encoding_goes_on(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    class Killed(Exception):
        pass

    def die(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        make(folder, cache, report=die)
    with pytest.raises(UserError, match="incomplete, 2 of 4 shards are missing: run the same"):
        _ = latents(cache).train_source
    done = make(folder, cache)
    assert (done.encoded, done.present) == (2, 2)
    once = tmp_path / "once"
    make(folder, once)
    for k in range(4):
        assert (cache / "train" / shard_name(k)).read_bytes() == (once / "train" / shard_name(k)).read_bytes()
    assert not list((cache / "train").glob(".claim*"))
    assert not list((cache / "train").glob("*.part"))


def test_a_claimed_shard_is_left_to_its_process(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "train").mkdir(parents=True)
    with (cache / "train" / ".claim-00001").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert make(folder, cache).elsewhere == 1
    assert make(folder, cache).encoded == 1


@pytest.mark.slow
def test_processes_share_the_work(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffzoo", "data", "encode", str(folder), "--out", str(tmp_path / "cache")]
    command += ["--autoencoder", "identity", "--size", "8", "--shard-rows", "2", "--workers", "0"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [p.communicate(timeout=250)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0, 0]
    assert sum(int(out.split("train: ")[1].split(" shards")[0]) for out in outputs) == ROWS // 2
    assert len(LatentSource(tmp_path / "cache" / "train")) == ROWS


def test_bad_images_are_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "004.png").write_bytes(b"broken")
    done = make(folder, tmp_path / "cache")
    assert len(done.bad) == 1
    source = LatentSource(tmp_path / "cache" / "train")
    assert len(source) == ROWS - 1
    assert "004.png" not in "".join(source.read_row(i).name for i in range(len(source)))
    with pytest.raises(UserError, match="more than max_bad = 0 allows"):
        make(folder, tmp_path / "strict", max_bad=0)


def test_the_last_shard_may_be_all_bad(folder: Path, tmp_path: Path) -> None:
    """40 images in shards of 12: the fourth has the last four."""
    files = sorted(folder.rglob("*.png"))
    for file in files[36:]:
        file.write_bytes(b"broken")
    for _ in range(2):
        assert set(make(folder, tmp_path / "cache").bad) == {36, 37, 38, 39}
    source = LatentSource(tmp_path / "cache" / "train")
    assert source.block_sizes.tolist() == [12, 12, 12, 0]
    assert len(next(iter(latents(tmp_path / "cache").one_pass("train")))["id"]) == 36
    for file in files:
        file.write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match=f"none of the {ROWS} images of .* can be decoded"):
            make(folder, tmp_path / "nothing")


def test_bad_images_count_over_the_whole_cache(folder: Path, tmp_path: Path) -> None:
    """Not anew for every process: three in the first shard, and in the second one more than the limit."""
    files = sorted(folder.rglob("*.png"))
    for i in (0, 1, 2, 14):
        files[i].write_bytes(b"broken")
    for there in (0, 2, 2):
        assert len(list((tmp_path / "cache").rglob("latents-*"))) == there
        with pytest.raises(UserError, match=r"4 images of .* cannot be decoded, more than max_bad = 3 .*028\.png"):
            make(folder, tmp_path / "cache", max_bad=3)
    done = make(folder, tmp_path / "cache", max_bad=4)
    assert (done.encoded, done.present, set(done.bad)) == (2, 2, {0, 1, 2, 14})


def test_the_metadata_count_and_hashes(folder: Path, tmp_path: Path) -> None:
    sorted(folder.rglob("*.png"))[4].write_bytes(b"broken")
    cache = tmp_path / "cache"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        make(folder, cache, report=stop)
    assert (read_cache_metadata(cache / "train").images, read_cache_metadata(cache / "train").ids) == (None, "")
    make(folder, cache)
    cache_metadata = json.loads((cache / "train" / "passport.json").read_text())
    kept = [row for row in range(ROWS) if row != 4]
    assert cache_metadata["pictures"] == len(kept)
    assert cache_metadata["ids"] == hashlib.sha256(struct.pack(f"<{len(kept)}q", *kept)).hexdigest()
    assert cache_metadata["fast_jpeg"] is False


def test_shards_that_disagree_with_the_metadata_are_refused(folder: Path, tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    make(folder, cache)
    make(folder, other, type("Other", (Halves,), {"id": "other", "hash": "1" * 64})())
    first, second = (cache / "train" / shard_name(k) for k in range(2))
    sound = first.read_bytes()

    first.write_bytes((other / "train" / shard_name(0)).read_bytes())
    with pytest.raises(UserError, match=r"latents-00000.safetensors does not belong to the cache"):
        _ = latents(cache).train_source
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"hold 40 images .* but their metadata say 40 \(rows .*: delete the folder"):
        _ = latents(cache).train_source
    first.write_bytes(sound)
    about = open_shard(cache / "train", 0).metadata()
    save_file({k: v[:-1].copy() for k, v in load_file(first).items()}, first, metadata=about)
    with pytest.raises(UserError, match=r"hold 39 images .* but their metadata say 40"):
        _ = latents(cache).train_source
    first.write_bytes(sound)
    tensors = load_file(first)
    save_file({**tensors, "moments": tensors["moments"][:, :1].copy()}, first, metadata={HEADER: about[HEADER]})
    with pytest.raises(UserError, match="does not belong"):
        _ = latents(cache).train_source
    first.write_bytes(sound)
    assert len(latents(cache).train_source) == ROWS
    values = json.loads((cache / "train" / "passport.json").read_text())
    (cache / "train" / "passport.json").write_text(json.dumps({**values, "version": 1}))
    with pytest.raises(UserError, match=r"have format 1, and this diffzoo reads format 2: encode again"):
        _ = latents(cache).train_source


@pytest.mark.parametrize("by_block", [False, True])
def test_workers_write_the_same_bytes(tmp_path: Path, by_block: bool) -> None:
    some = rows(0, 45)
    for row in (3, 17, 44):
        some[row]["image"] = None
    write_parquet(tmp_path / "x.parquet", some, 10)  # row groups that do not end where shards do
    read = tmp_path / "read"
    for workers in (0, 2):
        read.write_text("")
        data = Shards([str(tmp_path / "x.parquet")], by_block, batch_size=8)
        source, plain = data.train_source, data.train_source.read_block

        def noted(block: int, plain=plain):
            with read.open("a") as file:
                file.write(f"{block} {os.getpid()}\n")
            return plain(block)

        source.read_block = noted
        cache_metadata = make_cache_metadata(source, data.transform, 2, Halves(), 22)
        out = tmp_path / str(workers)
        done = encode(source, out, data.transform, Halves().encode, cache_metadata, 4, num_workers=workers)
        assert (done.encoded, set(done.bad)) == (3, {3, 17, 44})
        blocks = [line.split() for line in read.read_text().splitlines()]
        assert (str(os.getpid()) in {process for _, process in blocks}) == (workers == 0)
        if by_block:
            assert {int(b) for b, _ in blocks} == set(range(5))
            assert len(blocks) <= 7  # shards cut two of them
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert names == [
        "latents-00000.safetensors",
        "latents-00001.safetensors",
        "latents-00002.safetensors",
        "passport.json",
    ]
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    captions = LatentSource(tmp_path / "0")._captions
    assert captions[0][5] == ["6 a"]  # row 3 is left out
    assert np.array_equal(LatentSource(tmp_path / "0").labels(), [i % 3 for i in range(45) if i not in (3, 17, 44)])


def test_decoding_goes_on_while_the_encoder_works(folder: Path, tmp_path: Path) -> None:
    data = pixels(folder)
    source, plain, read = data.train_source, data.train_source.read_row, tmp_path / "read"

    def noted(row: int):
        with read.open("a") as file:
            file.write(f"{row}\n")
        return plain(row)

    source.read_row = noted
    ahead: list[int] = []

    def slow(images):
        end = time.monotonic() + 20
        while not ahead and len(read.read_text().splitlines()) < 15 and time.monotonic() < end:
            time.sleep(0.01)
        ahead.append(len(read.read_text().splitlines()))
        return Halves().encode(images)

    cache_metadata = make_cache_metadata(source, data.transform, 1, Halves(), SHARD)
    encode(source, tmp_path / "cache", data.transform, slow, cache_metadata, 5, num_workers=1)
    assert ahead[0] >= 15  # of the second shard, too, while the first five are encoded


def test_another_cache_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache")

    class Other(Halves):
        id, hash = "other", "1" * 64

    with pytest.raises(UserError, match=r"holds latents of something else .*autoencoder: 'halves', 'other'"):
        make(folder, tmp_path / "cache", Other())


def test_training_refuses_what_disagrees(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"no latents in .* make them with `diffzoo data encode"):
        _ = latents(cache).train_source
    make(folder, cache)
    for settings, message in (
        ({"image_size": 32}, "are of 4 px .* but the recipe expects 32"),
        ({"pixels": 16}, "were made from images of 8 px, not 16"),
        ({"resize": "area"}, "were made with the resize 'adm', not 'area'"),
    ):
        with pytest.raises(UserError, match=message):
            _ = latents(cache, **settings).train_source
    module = Recorder()
    module.autoencoder = type("Other", (), {"id": "other", "hash": "1" * 64})()
    with pytest.raises(UserError, match=r"made by halves \(000000000000\), but the recipe's autoencoder is other"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, datamodule=latents(cache))
    make(folder, tmp_path / "unmirrored", flips=1)
    with pytest.raises(UserError, match="hold no mirror images: set flip to false"):
        _ = latents(tmp_path / "unmirrored").train_source
    (cache / "train" / "passport.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata .* are damaged"):
        _ = latents(cache).train_source


def test_a_changed_cache_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache")
    state = latents(tmp_path / "cache").state_dict()
    (folder / "cat" / "004.png").unlink()
    make(folder, tmp_path / "other")
    with pytest.raises(UserError, match="no longer what the checkpoint was trained on"):
        latents(tmp_path / "other").load_state_dict(state)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    command = ["data", "encode", str(folder), "--out", str(cache), "--autoencoder", "identity", "--size", "8"]
    assert main([*command, "--workers", "0", "--shard-rows", "16"]) == 0
    assert "complete: train with data" in capsys.readouterr().out
    batch = next(iter(Latents(str(cache), image_size=8, batch_size=4, num_workers=0, flip=False).train_dataloader()))
    assert batch["moments"].shape == (4, 6, 8, 8)
    assert main(["data", "inspect", str(folder), "--size", "8", "--json", "--sheet", str(tmp_path / "sheet.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"]["train"] == ROWS
    assert report["class histogram"] == {"cat": 20, "dog": 20}
    assert "images/s at 8 px" in report["throughput"]
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert main(["data", "inspect", str(tmp_path / "nowhere")]) == 2
    assert "no file or folder" in capsys.readouterr().err
    out = tmp_path / "reference.npz"
    stats = ["data", "stats", str(folder), "--size", "16", "--out", str(out), "--networks", "random-conv"]
    assert main([*stats, "--workers", "0"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["images"] == ROWS
