"""Where downloads and converted weights go, from the environment variables of the Hub's client."""

from pathlib import Path

import pytest

from diffzoo.cache import cache_dir, hub_cache_dir


@pytest.mark.parametrize(
    ("given", "converted", "downloads"),
    [
        ({}, "user/.cache/huggingface/diffzoo", "user/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/diffzoo", "xdg/huggingface/hub"),
        ({"HF_HOME": "big"}, "big/diffzoo", "big/hub"),
        ({"HF_HUB_CACHE": "disk"}, "disk/diffzoo", "disk"),
        ({"HF_HUB_CACHE": "disk", "XDG_CACHE_HOME": "xdg"}, "disk/diffzoo", "disk"),
        ({"HF_HUB_CACHE": "disk", "HF_HOME": "big"}, "big/diffzoo", "disk"),
        ({"HF_HUB_CACHE": "~/disk"}, "user/disk/diffzoo", "user/disk"),
    ],
)
def test_converted_weights_lie_on_the_disk_that_was_chosen(
    given: dict[str, str], converted: str, downloads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        value = given.get(name)
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value if value.startswith("~") else str(tmp_path / value))
    assert cache_dir() == tmp_path / converted
    assert hub_cache_dir() == tmp_path / downloads
