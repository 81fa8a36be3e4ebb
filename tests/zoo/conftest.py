"""A cache of its own for every test, a Hub in memory, tiny networks and manifests of them."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import FakeHub
from zoo_entry import ENTRY

from diffzoo.models import dimr, registry
from diffzoo.models.base import Network
from diffzoo.zoo import manifest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `HF_HOME`; no token, no xet, no waiting between attempts."""
    path = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(path))
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "DIFFZOO_DRIVE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("diffzoo.zoo.fetch._pause", lambda *args: None)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running Hub that client and package talk to, logged in as its user."""
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("DIFFZOO_DRIVE_ENDPOINT", f"{server.url}/drive")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def filled(network: Network, seed: int = 1) -> Network:
    """The network with every parameter drawn at random, so that no two tensors are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


@pytest.fixture
def tiny(own_registry: None) -> Network:
    """A small DiMR, registered as `dimr_tiny` for the length of the test."""
    registry.register_model("dimr_tiny", dimr.DiMR, dimr.TINY)
    return filled(dimr.DiMR(dimr.TINY))


@pytest.fixture
def official(tiny: Network) -> dict[str, torch.Tensor]:
    """Its weights under the official names."""
    from diffzoo.zoo.converters import dimr as converter

    return converter.to_official(tiny.state_dict(), dimr.TINY)


@pytest.fixture
def publish(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `dimr_tiny.test` an entry of the manifest, with fields replaced."""
    import yaml

    def make(**fields: Any) -> None:
        entries = manifest.parse_manifest(yaml.safe_dump({"dimr_tiny.test": {**ENTRY, **fields}}), "test.yaml")
        monkeypatch.setattr(manifest, "_load", lambda path: entries)

    return make


@pytest.fixture
def unpinned() -> Iterator[None]:
    """The loud warning about an unpinned file, expected and silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dimr_tiny.test is unpinned")
        yield
