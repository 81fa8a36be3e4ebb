"""`diffzoo verify`: it accepts the original and nothing else."""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hub_server import FakeHub
from torch import Tensor

from diffzoo import GaussianProcess
from diffzoo.cache import cache_dir
from diffzoo.cli.main import main
from diffzoo.files import to_json, write_text
from diffzoo.models import adm
from diffzoo.models.base import Network
from diffzoo.models.registry import entry
from diffzoo.pins import read_record, weights_record
from diffzoo.process import Eps, TimeConditioning
from diffzoo.record import to_plain
from diffzoo.sampling import DPMSolver
from diffzoo.zoo import load_any
from diffzoo.zoo.building import build_meta
from diffzoo.zoo.verify import fingerprint, largest_error, probe, verify

PROCESS = GaussianProcess(prediction=Eps(), noise_conditioning=TimeConditioning(8.0, -4.0))  # that of the entry


@pytest.fixture
def at_url(hub: FakeHub, official: dict[str, Tensor], publish: Callable[..., None], unpinned: None) -> Any:
    """Publish the original at a URL, with fields of its entry replaced."""
    buffer = io.BytesIO()
    torch.save(official, buffer)
    hub.files["w.pth"] = buffer.getvalue()

    def make(**fields: Any) -> str:
        publish(source={"url": f"{hub.url}/files/w.pth"}, **fields)
        return hashlib.sha256(hub.files["w.pth"]).hexdigest()

    return make


def recorded(network: Network) -> dict[str, Any]:
    mark = fingerprint(network, PROCESS)
    return {"mean": mark.mean, "std": mark.std, "first": list(mark.first)}


def test_the_fingerprint_is_the_networks_own_output(tiny: Network) -> None:
    z, level, cond = probe(tiny, PROCESS)
    assert level.tolist() == pytest.approx([8 * 0.3 - 4, 8 * 0.8 - 4])
    with torch.no_grad():
        output = tiny(z, level, cond)
    mark = fingerprint(tiny, PROCESS)
    assert mark.mean == pytest.approx(float(output.mean()), abs=1e-6)
    assert mark.std == pytest.approx(float(output.double().std()), abs=1e-6)
    assert mark.first == pytest.approx(output.flatten()[:8].tolist(), abs=1e-6)
    assert fingerprint(tiny, PROCESS) == mark


@pytest.mark.parametrize("config", [adm.TINY, adm.TINY.override(upsampler=True), adm.TINY.override(num_classes=0)])
def test_networks_of_adm_have_fingerprints(config: adm.ADMConfig) -> None:
    network = adm.ADMUNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mark = fingerprint(network, PROCESS)
    assert mark.std > 0
    next(network.parameters()).data.mul_(1.01)
    assert largest_error(fingerprint(network, PROCESS), mark) > 1e-6


def test_classifiers_of_adm_have_fingerprints() -> None:
    network = adm.ADMClassifier(adm.TINY_CLASSIFIER)
    assert len(fingerprint(network, PROCESS).first) == 8


@pytest.mark.parametrize("name", ["uvit_bao_s_32", "uvit_bao_t2i_s_256"])
def test_every_family_can_be_probed(name: str) -> None:
    config = entry(name).config
    z, _, cond = probe(build_meta(entry(name).network, config), PROCESS)
    assert z.shape == (2, config.in_channels, config.image_size, config.image_size)
    text = config.text_width
    assert (cond is None) == (not config.num_classes and not text)
    if text:
        assert cond is not None
        assert cond.text is not None
        assert cond.text.shape == (2, 77, text)


def test_the_pinned_original_is_accepted(hub: FakeHub, at_url: Any, tiny: Network) -> None:
    sha = at_url()
    at_url(sha256=sha, unpinned=None, size=len(hub.files["w.pth"]), fingerprint=recorded(tiny))
    report = verify("dimr_tiny")
    assert report.ok
    assert report.pinned
    assert report.verdict == "this is the original, and its output is as recorded"
    assert report.largest_error is not None
    assert report.largest_error < 1e-6
    assert report.tensors == len(tiny.state_dict())
    assert report.parameters == tiny.num_parameters()


def test_another_file_is_refused(at_url: Any) -> None:
    at_url(sha256="0" * 64, unpinned=None)
    report = verify("dimr_tiny")
    assert not report.ok
    assert "is not the file that the manifest knows" in report.verdict


def test_another_output_is_refused(at_url: Any, tiny: Network) -> None:
    mark = recorded(tiny)
    mark["first"][3] += 3e-4
    at_url(fingerprint=mark)
    report = verify("dimr_tiny")
    assert not report.ok
    assert report.largest_error == pytest.approx(3e-4, rel=1e-2)
    assert "differs from the record by 3.0" in report.verdict


def test_another_process_is_refused(at_url: Any, tiny: Network) -> None:
    at_url(
        fingerprint=recorded(tiny),
        process={"prediction": "Eps", "noise_conditioning": {"class": "TimeConditioning", "scale": 7.0}},
    )
    assert not verify("dimr_tiny").ok


def test_weights_of_another_shape_are_refused(hub: FakeHub, at_url: Any, official: dict[str, Tensor]) -> None:
    name = next(k for k in official if k.endswith("class_embeds.weight"))
    buffer = io.BytesIO()
    torch.save({**official, name: official[name][:-1]}, buffer)
    hub.files["w.pth"] = buffer.getvalue()
    at_url()
    report = verify("dimr_tiny")
    assert not report.ok
    assert "has shape (10, 32), this config needs (11, 32)" in report.verdict


def test_unpinned_is_explained_recorded_and_compared(hub: FakeHub, at_url: Any, tiny: Network) -> None:
    at_url()
    first = verify("dimr_tiny")
    assert first.ok
    assert not first.pinned
    assert first.largest_error is None
    sentence = "unpinned: recorded on first download, compared ever after (it is a test)"
    assert sentence in first.notes
    assert f"  note         {sentence}\n" in str(first)
    assert any(sentence in note and "unchanged since" in note for note in verify("dimr_tiny").notes)
    pin = read_record(weights_record("dimr_tiny.test"))
    assert pin["fingerprint"] == {**recorded(tiny), "tolerance": 1e-4}
    second = verify("dimr_tiny")
    assert second.ok
    assert second.largest_error == 0
    write_text(weights_record("dimr_tiny.test"), to_json({**pin, "fingerprint": {**pin["fingerprint"], "mean": 9.0}}))
    assert not verify("dimr_tiny").ok


def test_a_converted_copy_that_was_altered_is_found(at_url: Any) -> None:
    at_url()
    load_any("dimr_tiny")
    report = verify("dimr_tiny")
    assert report.ok
    assert "the converted copy in the cache is equal to the original" in report.notes
    path = next((cache_dir() / "dimr_tiny.test").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = verify("dimr_tiny")
    assert not report.ok
    assert "delete" in report.verdict


def test_the_command_prints_a_verdict_and_json(
    hub: FakeHub, at_url: Any, tiny: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    sha = at_url(fingerprint=recorded(tiny))
    assert main(["verify", "dimr_tiny", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["sha256"], report["name"]) == (True, sha, "dimr_tiny.test")
    assert report["largest_error"] < 1e-6
    assert main(["verify", "dimr_tiny"]) == 0
    out = capsys.readouterr().out
    assert "verdict      OK: nothing has changed" in out
    assert sha in out
    at_url(sha256="0" * 64)
    assert main(["verify", "dimr_tiny"]) == 1
    assert "verdict      FAILED" in capsys.readouterr().out
    assert main(["verify", "dimr_none"]) == 2


def test_json_is_printed_when_the_file_cannot_be_had(
    at_url: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_url()
    hub.fail("/files/w.pth", 404)
    assert main(["verify", "dimr_tiny", "--json"]) == 2
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["ok"], report["name"], report["pinned"], report["sha256"]) == (False, "dimr_tiny.test", False, None)
    assert report["source"] == f"{hub.url}/files/w.pth"
    assert report["sampled_with"]["sampler"] == to_plain(DPMSolver(steps=6), sparse=True)
    assert "answered 404" in report["verdict"]
    assert "answered 404" in printed.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["verify", "dimr_tiny", "--json"]) == 2
    offline = json.loads(capsys.readouterr().out)
    assert offline.keys() == report.keys()
    assert offline["verdict"].startswith("offline (HF_HUB_OFFLINE=1)")
    assert main(["verify", "dimr_none", "--json"]) == 2
    unknown = json.loads(capsys.readouterr().out)
    assert (unknown["ok"], unknown["name"], unknown["source"]) == (False, "dimr_none", "")
    assert "no published weights for 'dimr_none'" in unknown["verdict"]
    assert main(["verify", "dimr_none"]) == 2
    assert capsys.readouterr().out == ""
