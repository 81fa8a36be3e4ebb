"""Downloads by the standard library: what is cut goes on or is discarded, what is wrong is refused and said."""

import errno
import hashlib
import io
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import FakeHub

from diffzoo import create_model
from diffzoo.cache import cache_dir
from diffzoo.errors import UserError
from diffzoo.pins import read_record, weights_record
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.fetch import HashMismatchError, download, fetch
from diffzoo.zoo.manifest import find_pretrained

BLOB = bytes(range(256)) * 200


def as_file(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "w.bin"


# -- going on


def test_a_cut_download_goes_on_where_it_stopped(hub: FakeHub, target: Path) -> None:
    hub.files["w"] = BLOB
    hub.cut("/files/w", after=20_000, times=2)
    download(f"{hub.url}/files/w", target)
    assert target.read_bytes() == BLOB
    assert len(hub.requests("/files/w")) == 3
    assert [p.name for p in target.parent.iterdir() if p.name.startswith("w.bin")] == ["w.bin"]


def test_a_kill_between_two_runs_is_made_good(hub: FakeHub, target: Path) -> None:
    hub.files["w"] = BLOB
    hub.cut("/files/w", after=30_000, times=1)
    with pytest.raises(UserError, match="cut short: try again, it goes on where it stopped"):
        download(f"{hub.url}/files/w", target, attempts=1)
    assert not target.exists()
    part = target.with_name("w.bin.incomplete")
    assert part.read_bytes() == BLOB[:30_000]
    served: list[int] = []
    hub.on_blob = served.append
    download(f"{hub.url}/files/w", target)
    assert target.read_bytes() == BLOB
    assert served == [len(BLOB) - 30_000]


def test_a_file_that_changed_meanwhile_is_fetched_anew(hub: FakeHub, target: Path) -> None:
    hub.files["w"] = BLOB
    hub.cut("/files/w", after=30_000, times=1)
    with pytest.raises(UserError):
        download(f"{hub.url}/files/w", target, attempts=1)
    hub.files["w"] = BLOB[::-1]
    download(f"{hub.url}/files/w", target)
    assert target.read_bytes() == BLOB[::-1]


def test_without_an_etag_a_part_is_discarded(hub: FakeHub, target: Path) -> None:
    hub.files["w"], hub.validators = BLOB, False
    hub.cut("/files/w", after=30_000, times=1)
    with pytest.raises(UserError):
        download(f"{hub.url}/files/w", target, attempts=1)
    hub.files["w"] = BLOB[::-1]
    download(f"{hub.url}/files/w", target)
    assert target.read_bytes() == BLOB[::-1]


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry_After": "0"}), (503, {}), (500, {})])
def test_passing_trouble_is_waited_out(hub: FakeHub, target: Path, status: int, headers: dict[str, str]) -> None:
    hub.files["w"] = BLOB
    hub.fail("/files/w", status, times=2, **headers)
    assert download(f"{hub.url}/files/w", target).read_bytes() == BLOB


# -- sentences


@pytest.mark.parametrize(
    ("status", "sentence", "requests"),
    [
        (404, "answered 404: there is nothing at this address any more", 1),
        (403, "answered 403: the file is no longer public, or its quota of downloads is exceeded: try again", 1),
        (401, "answered 401: the file is no longer public, or its quota of downloads is exceeded: try again", 1),
        (429, "answered 429: too many requests from your address: wait a few minutes, then try again", 3),
        (502, "answered 502: the server has a fault of its own: try again later", 3),
    ],
)
def test_every_refusal_has_its_sentence(hub: FakeHub, target: Path, status: int, sentence: str, requests: int) -> None:
    hub.fail("/files/w", status)
    with pytest.raises(UserError, match=sentence) as error:
        download(f"{hub.url}/files/w", target, "the weights", attempts=3)
    assert not any(word in str(error.value) for word in ("token", "log in", "hf auth"))  # which are the Hub's
    assert len(hub.requests("/files/w")) == requests
    assert not target.exists()


def test_an_unreachable_host_is_named(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be reached and the weights is not in the cache"):
        download(f"http://127.0.0.1:{port}/w", target, "the weights", attempts=2)


def test_offline_says_what_to_fetch(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"offline \(HF_HUB_OFFLINE=1\) and the weights is not in the cache"):
        download("http://127.0.0.1:1/w", target, "the weights")


def test_a_full_disk_is_said_before_the_download(hub: FakeHub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["w"] = BLOB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9_000, 9_000))
    with pytest.raises(UserError, match=r"the disk is too full for w.bin: it needs 0.05 MB and 0.01 MB are free"):
        download(f"{hub.url}/files/w", target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("place", "advice"), [("home/diffzoo/w.bin", "point HF_HOME to another disk"), ("w.bin", "choose another disk")]
)
def test_a_disk_that_fills_up_meanwhile_is_said(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, advice: str
) -> None:
    hub.files["w"], target = BLOB, tmp_path / place

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffzoo.zoo.fetch._copy", full)
    with pytest.raises(UserError, match=rf"the disk is full while writing .*w\.bin .* {advice}$"):
        download(f"{hub.url}/files/w", target)
    assert not target.exists()


# -- Google Drive


def test_drive_is_asked_twice_when_it_wants_a_confirmation(
    hub: FakeHub, official: dict[str, torch.Tensor], publish: Callable[..., None], unpinned: None
) -> None:
    hub.drive["abc-1"] = as_file(official)
    publish(source={"drive": "abc-1"})
    original = fetch(find_pretrained("dimr_tiny.test"))
    assert original.path.read_bytes() == hub.drive["abc-1"]
    assert original.sha256 == hashlib.sha256(hub.drive["abc-1"]).hexdigest()
    assert len(hub.requests("/drive")) == 2


def test_a_missing_drive_file_is_said(hub: FakeHub, publish: Callable[..., None], tiny: Any) -> None:
    publish(source={"drive": "gone"})
    with pytest.raises(UserError, match="answered 404"):
        fetch(find_pretrained("dimr_tiny.test"))
    hub.fail("/drive", 403)
    with pytest.raises(UserError, match=r"Google Drive file gone.* answered 403: the file is no longer public"):
        fetch(find_pretrained("dimr_tiny.test"))


@pytest.mark.parametrize(
    ("page", "sentence"),
    [("<html>Quota exceeded</html>", "daily limit of downloads"), ("<html>sign in</html>", "got a web page")],
)
def test_a_page_instead_of_a_file_is_refused(hub: FakeHub, target: Path, page: str, sentence: str) -> None:
    hub.pages["p"] = page
    with pytest.raises(UserError, match=sentence):
        download(f"{hub.url}/pages/p", target, "the weights")
    assert not target.exists()


# -- hashes


def test_first_download_is_recorded_loudly_and_compared_ever_after(
    hub: FakeHub, official: dict[str, torch.Tensor], publish: Callable[..., None]
) -> None:
    hub.files["w.pth"] = as_file(official)
    publish(source={"url": f"{hub.url}/files/w.pth"})
    sha = hashlib.sha256(hub.files["w.pth"]).hexdigest()
    with pytest.warns(UserWarning, match=f"dimr_tiny.test is unpinned .* recorded on first download as sha256 {sha}"):
        create_model("dimr_tiny", pretrained=True)
    pin = read_record(weights_record("dimr_tiny.test"))
    assert (pin["sha256"], pin["size"]) == (sha, len(hub.files["w.pth"]))
    create_model("dimr_tiny", pretrained=True)  # warm, and without a second warning, which would be an error here

    folder = cache_dir() / "dimr_tiny.test"
    shutil.rmtree(folder / "original")
    for converted in folder.glob("*.safetensors"):
        converted.unlink()
    hub.files["w.pth"] += b"x"
    with pytest.raises(HashMismatchError, match=f"an earlier download knows: expected sha256 {sha}"):
        create_model("dimr_tiny", pretrained=True)
    assert not list((folder / "original").glob("*.pth"))
    assert not list(folder.glob("*.safetensors"))


def test_a_wrong_hash_is_refused_before_the_file_is_opened(
    hub: FakeHub, official: dict[str, torch.Tensor], publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["w.pth"] = as_file(official)
    publish(source={"url": f"{hub.url}/files/w.pth"}, sha256="0" * 64)
    monkeypatch.setattr("torch.load", lambda *args, **options: pytest.fail("opened before its hash was checked"))
    with pytest.raises(HashMismatchError, match="not the file that the manifest knows: expected sha256 0000"):
        create_model("dimr_tiny", pretrained=True)
    assert not list((cache_dir() / "dimr_tiny.test").rglob("*.pth"))


def test_a_file_that_was_cut_on_disk_is_refused(
    hub: FakeHub, official: dict[str, torch.Tensor], publish: Callable[..., None], unpinned: None
) -> None:
    hub.files["w.pth"] = as_file(official)
    publish(source={"url": f"{hub.url}/files/w.pth"})
    path = fetch(find_pretrained("dimr_tiny.test")).path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HashMismatchError, match="it was deleted and nothing was loaded"):
        fetch(find_pretrained("dimr_tiny.test"))
    assert fetch(find_pretrained("dimr_tiny.test")).path.read_bytes() == hub.files["w.pth"]


def test_a_file_of_the_package_needs_no_network(
    tiny: Any, publish: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("diffzoo.zoo.fetch.PACKAGE", tmp_path / "diffzoo")
    save_pretrained(tiny, tmp_path / "diffzoo" / "weights")
    file = tmp_path / "diffzoo" / "weights" / "model.safetensors"
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    publish(source={"package": "weights/model.safetensors"}, converter="diffzoo", sha256=sha, unpinned=None)
    loaded = create_model("dimr_tiny", pretrained=True)
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in loaded.state_dict().items())
    publish(source={"package": "weights/model.safetensors"}, converter="diffzoo", sha256="1" * 64, unpinned=None)
    with pytest.raises(HashMismatchError):
        create_model("dimr_tiny", pretrained=True)
    assert file.exists()
