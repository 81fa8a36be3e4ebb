"""One file of weights out of a run, and the manifest entry that loads it from inside the package, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from manifest_entry import manifest_entry
from networks import perturbed
from safetensors import safe_open

from diffzoo import GaussianProcess, create_model, load_any, pipeline
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.files import sha256
from diffzoo.models import registry, uvit_bao
from diffzoo.process import V
from diffzoo.sampling import Guidance
from diffzoo.zoo import manifest, save_pretrained
from diffzoo.zoo.export import export
from diffzoo.zoo.verify import verify

CONFIG = uvit_bao.UViTBaoConfig(image_size=8, in_channels=3, num_classes=4, width=32, depth=3, heads=4)
NAMES = ("cat", "dog", "hen", "owl")


@pytest.fixture
def source(tmp_path: Path, own_registry: None) -> Path:
    """A trained model of three classes more than its registered name has."""
    registry.register_model("uvit_nano", uvit_bao.UViTBao, CONFIG.override(num_classes=1))
    torch.manual_seed(1)
    network = perturbed(uvit_bao.UViTBao(CONFIG))
    folder = tmp_path / "trained"
    save_pretrained(network, folder, process=GaussianProcess(prediction=V()), class_names=NAMES, name="uvit_nano")
    return folder


def install(made: Any, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the file where an installed package has it, and its entry into the manifest."""
    (package / "weights").mkdir(parents=True)
    made.path.rename(package / "weights" / made.path.name)
    monkeypatch.setattr("diffzoo.zoo.fetch.PACKAGE", package)
    entries = manifest.parse_manifest(manifest_entry(package / "weights" / made.path.name, "own"), "own.yaml")
    monkeypatch.setattr(manifest, "_load", lambda path: entries)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_in_the_package_load_by_name_without_a_network(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, dtype: Any
) -> None:
    made = export(source, tmp_path / "w.safetensors", dtype=dtype, licence="mit",
                  guidance={"formula": "uncond + s * (cond - uncond)", "scale": 2.0})  # fmt: skip
    install(made, tmp_path / "site" / "diffzoo", monkeypatch)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("went to the network"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    before = load_any(source).network.state_dict()
    for network in (create_model("uvit_nano", pretrained=True), create_model("uvit_nano.own")):
        assert network.config == CONFIG
        for name, value in network.state_dict().items():
            assert value.dtype == torch.float32
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
            assert torch.equal(value, before[name].to(kind).float()), name
    images = pipeline("uvit_nano.own", "cpu")(["owl"], seeds=[1], steps=2)
    assert images.labels == ["owl"]
    assert images.records[0]["guidance"]["scale"] == 2.0
    report = verify("uvit_nano.own")
    assert (report.ok, report.pinned, report.largest_error) == (True, True, 0.0)
    assert not home.exists() or not any(home.rglob("*.safetensors"))  # read where it lies, copied nowhere


def test_the_header_says_everything_and_the_file_loads_alone(source: Path, tmp_path: Path) -> None:
    made = export(source, tmp_path / "w.safetensors", dtype="bf16", licence="cc0-1.0")
    with safe_open(made.path, "pt") as file:
        header = json.loads(file.metadata()["diffzoo"])
    assert (header["licence"], header["class_names"]) == ("cc0-1.0", list(NAMES))
    assert header["network"].endswith(".UViTBao")
    assert header["process"]["prediction"] == {"class": "diffzoo.process.V"}
    assert str(tmp_path) not in json.dumps(header)
    assert load_any(made.path).process == GaussianProcess(prediction=V())
    assert yaml.safe_load(manifest_entry(made.path, "own"))["uvit_nano.own"]["config"] == {"num_classes": 4}
    assert 0 < made.largest_change < 2**-7  # bfloat16 has 8 bits of mantissa
    assert export(source, tmp_path / "v.safetensors", dtype="bf16", licence="cc0-1.0").sha256 == made.sha256


def test_a_damaged_file_in_the_package_is_refused_and_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export(source, tmp_path / "w.safetensors", licence="mit")
    package = tmp_path / "site" / "diffzoo"
    install(made, package, monkeypatch)
    file = package / "weights" / "w.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that the manifest knows"):
        create_model("uvit_nano.own")
    assert file.exists()
    file.unlink()
    with pytest.raises(UserError, match="is missing from the installation: install diffzoo again"):
        create_model("uvit_nano.own")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "need a licence"),
        ({"licence": "mit", "dtype": "bf61"}, "did you mean 'bf16'"),
        ({"licence": "mit", "weights": "ema_0.9"}, "holds no EMA 'ema_0.9'"),
        (
            {"licence": "mit", "guidance": {"formula": "x", "scale": 1}},
            "guidance.formula: expected one of 'uncond', 'cond', got 'x'",
        ),
    ],
)
def test_bad_requests(source: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        export(source, tmp_path / "w.safetensors", **options)
    assert not (tmp_path / "w.safetensors").exists()


def test_a_stated_licence_stays(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "w.safetensors", licence="mit")
    with pytest.raises(UserError, match=r"w\.safetensors states the licence mit, not cc0-1\.0: leave the licence out"):
        export(tmp_path / "w.safetensors", tmp_path / "v.safetensors", licence="cc0-1.0")


def test_what_does_not_fit_into_half_precision_is_refused(source: Path, tmp_path: Path) -> None:
    network = load_any(source).network
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = 1e6
    save_pretrained(network, tmp_path / "large")
    with pytest.raises(UserError, match=r"reaches 1e\+06, and torch\.float16 ends at 6\.55e\+04: use bf16"):
        export(tmp_path / "large", tmp_path / "w.safetensors", dtype="fp16", licence="mit")


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.safetensors"
    options = ["--dtype", "bf16", "--licence", "mit", "--guidance", "1.5"]
    assert main(["export", str(source), str(file), *options]) == 0
    assert sha256(file) in capsys.readouterr().out
    assert load_any(file).metadata.guidance == Guidance(1.5)
    assert main(["export", str(source), str(tmp_path / "w.pt"), "--licence", "mit"]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
