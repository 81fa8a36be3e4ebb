"""Latent caches: what is written, resuming, several processes, refusals, and the position on them."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.pictures import Recorder, picture, quiet_trainer

from diffzoo.cli.main import main
from diffzoo.data import ImageFolder, Latents
from diffzoo.data.encode import encode, make_passport
from diffzoo.data.latents import LatentSource, Passport, shard_name
from diffzoo.data.transforms import to_images
from diffzoo.errors import UserError

ROWS, SHARD = 40, 12


class Halves:
    """An autoencoder that averages 2×2 pixels; the standard deviation is a function of the mean."""

    id, hash = "halves", "0" * 64

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, mean.abs() / 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    for i in range(ROWS):
        file = path / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
        file.with_suffix(".txt").write_text(f"one {i}\ntwo {i}")
    return path


def pixels(folder: Path, **settings) -> ImageFolder:
    return ImageFolder(str(folder), **{"image_size": 8, "batch_size": 8, "num_workers": 0, **settings})


def make(folder: Path, out: Path, autoencoder=None, **settings):
    data = pixels(folder)
    autoencoder = autoencoder or Halves()
    passport = make_passport(data.train_source, data.transform, 2, autoencoder, SHARD)
    return encode(data.train_source, out / "train", data.transform, autoencoder.encode, passport, 5, **settings)


def latents(out: Path, **settings) -> Latents:
    return Latents(str(out), **{"image_size": 4, "batch_size": 8, "num_workers": 0, **settings})


def test_the_cache_holds_what_the_pixels_give(folder: Path, tmp_path: Path) -> None:
    """Same order, labels, captions and flips as the pixel module; moments are those of its pictures."""
    done = make(folder, tmp_path / "cache")
    assert (done.encoded, done.present, done.elsewhere, done.bad) == (4, 0, 0, {})
    for raw, cached in zip(
        [b for _ in range(2) for b in pixels(folder).train_dataloader()],
        [b for _ in range(2) for b in latents(tmp_path / "cache").train_dataloader()],
        strict=True,
    ):
        moments = torch.cat(Halves().encode(to_images(raw["image"])), dim=1)
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


def test_bad_pictures_are_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "004.png").write_bytes(b"broken")
    done = make(folder, tmp_path / "cache")
    assert len(done.bad) == 1
    source = LatentSource(tmp_path / "cache" / "train")
    assert len(source) == ROWS - 1
    assert "004.png" not in "".join(source.read_row(i).name for i in range(len(source)))
    with pytest.raises(UserError, match="more than max_bad = 0 allows"):
        make(folder, tmp_path / "strict", max_bad=0)


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
        ({"image_size": 32}, "are 4 px wide .* but the recipe expects 32"),
        ({"pixels": 16}, "were made from pictures of 8 px, not 16"),
        ({"resize": "area"}, "were made with the resize 'adm', not 'area'"),
    ):
        with pytest.raises(UserError, match=message):
            _ = latents(cache, **settings).train_source
    module = Recorder()
    module.autoencoder = type("Other", (), {"id": "other", "hash": "1" * 64})()
    with pytest.raises(UserError, match=r"made by halves \(000000000000\), but the recipe's autoencoder is other"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, datamodule=latents(cache))
    passport = Passport.read(cache / "train")
    (cache / "train" / "passport.json").write_text(json.dumps({**json.loads(passport.to_json()), "flips": 1}))
    with pytest.raises(UserError, match="hold no mirror images: set flip to false"):
        _ = latents(cache).train_source
    (cache / "train" / "passport.json").write_text("{")
    with pytest.raises(UserError, match=r"passport .* is damaged"):
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
    assert "pictures/s at 8 px" in report["throughput"]
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert main(["data", "inspect", str(tmp_path / "nowhere")]) == 2
    assert "no file or folder" in capsys.readouterr().err
    out = tmp_path / "reference.npz"
    stats = ["data", "stats", str(folder), "--size", "16", "--out", str(out), "--networks", "random-conv"]
    assert main([*stats, "--workers", "0"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["pictures"] == ROWS
