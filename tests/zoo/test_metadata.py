"""The record of a model: as earlier versions wrote it, and through trainings, adapters, exports and pushes."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffzoo import load_any, push_to_hub, save_pretrained
from diffzoo.cli.main import main
from diffzoo.encoders import AutoencoderSpec, TextEncoderSpec
from diffzoo.errors import UserError
from diffzoo.models import registry
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess, OffsetCosine, Shifted, TimeConditioning
from diffzoo.sampling import DDIM, DPMSolver, Guidance, Karras, PowerCosine, RespacedAncestral, RespacedDDIM
from diffzoo.training.reconstruction import write_reconstructed
from diffzoo.zoo import Metadata, Preset, metadata_of
from diffzoo.zoo.export import export
from diffzoo.zoo.metadata import Adapter, Base, Provenance, held_metadata, read_metadata
from diffzoo.zoo.publish import _fill
from diffzoo.zoo.saving import write_model

# Lightning's own: few workers, deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
GOLDEN = Path(__file__).parent / "metadata_0_1"  # written by version 0.1.0, before this record

CONFIG = UViTBaoConfig(image_size=8, in_channels=3, num_classes=3, width=32, depth=3, heads=4)
PROCESS = GaussianProcess(
    Shifted(OffsetCosine(), 64, 128), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0)
)
VAE = AutoencoderSpec("a/vae", 0.2, subfolder="vae")
KNOWN = Metadata(
    UViTBao,
    CONFIG,
    "uvit_bao_old",
    PROCESS,
    ("a", "b", "c"),
    Guidance(0.7, "cond", decay=PowerCosine(2.0)),
    DPMSolver(steps=7, grid=Karras()),
    VAE,
    version="0.1.0",
)


def golden(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / name).read_text())
    return data


# -- what earlier versions wrote


def test_a_checkpoint_of_an_earlier_version() -> None:
    assert held_metadata({"diffzoo": golden("run.json")}, "run") == KNOWN


def test_a_published_folder_of_an_earlier_version() -> None:
    """Its card said of every run that the base was not published; that was not known, and is not kept."""
    found = read_metadata(golden("pushed.json"), "config.json")
    trained = Provenance(checkpoint="step_00000002.ckpt", global_step=2, epoch=1, weights="ema_0.5")
    assert found == replace(KNOWN, licence="cc-by-4.0", provenance=trained)


def test_adapters_of_an_earlier_version_alone_and_merged() -> None:
    lora = held_metadata({"diffzoo": golden("lora.json")}, "run")
    assert lora is not None
    adapter = lora.adapter
    assert adapter is not None
    assert replace(adapter, base_sha256=None) == Adapter("/home/someone/runs/whole", 2, 3.0)
    assert lora == replace(KNOWN, guidance=None, sampler=DDIM(), adapter=adapter)
    merged = read_metadata(golden("merged.json"), "config.json").provenance.base
    assert merged is not None
    assert merged.source is None
    assert merged.provenance.global_step == 2


def test_ways_to_sample_of_an_earlier_version() -> None:
    found = read_metadata(golden("adm.json"), "config.json")
    assert found.process == GaussianProcess(
        DiscreteBetas("linear"),
        prediction=Eps(),
        noise_conditioning=TimeConditioning(1000.0, -1.0),
        learned_variance=True,
    )
    assert found.sampler == RespacedAncestral(steps=250)
    assert found.presets == {
        "plain": Preset(base="adm_64"),
        "guided": Preset(RespacedDDIM(steps=25), "adm_classifier_64", 1.25, "adm_64", "guided", "uniform"),
    }
    assert found.text_encoder == TextEncoderSpec("T5Encoder", "a/b", max_tokens=5, keep_padding=False)
    assert (found.class_names, found.licence) == ("imagenet-1k", "MIT")


@pytest.mark.parametrize("name", ["run.json", "lora.json", "pushed.json", "merged.json", "adm.json"])
def test_what_is_read_is_written_and_read_again(name: str) -> None:
    data = golden(name)
    found = held_metadata({"diffzoo": data}, name) if "model" in data else read_metadata(data, name)
    assert found is not None
    assert read_metadata(json.loads(json.dumps(found.to_plain())), name) == found


def test_old_files_load_as_weights(tmp_path: Path) -> None:
    state = UViTBao(CONFIG).state_dict()
    held = {"state_dict": {f"network.{k}": v for k, v in state.items()}, "diffzoo": golden("run.json")}
    torch.save({**held, "global_step": 2, "epoch": 1}, tmp_path / "step_00000002.ckpt")
    save_file(state, tmp_path / "alone.safetensors", {"diffzoo": json.dumps(golden("pushed.json"))})
    for file in ("step_00000002.ckpt", "alone.safetensors"):
        loaded = load_any(tmp_path / file)
        assert loaded.metadata.sampler == KNOWN.sampler
        assert loaded.provenance.global_step == 2
        assert all(torch.equal(v, state[k]) for k, v in loaded.network.state_dict().items())


def test_equal_metadata_give_equal_files(tmp_path: Path) -> None:
    """Whether numbers were whole or not, and whoever writes."""
    network = UViTBao(CONFIG)
    known = replace(KNOWN, process=replace(PROCESS, schedule=Shifted(OffsetCosine(), 64.0, 128.0)))
    assert known == KNOWN
    write_model(network.state_dict(), KNOWN, tmp_path / "a")
    save_pretrained(network, tmp_path / "b", metadata=known)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"config": {}}, "x does not say which network its weights belong to"),
        ({"family": "UViTBaoo", "config": {}}, "x: network: expected .*did you mean 'UViTBao'"),
        ({"network": "my_lost_module.Net", "config": {}}, "lies in the module my_lost_module, which cannot be"),
        ({"family": "UViTBao", "config": {"depht": 3}}, "x.config: expected fields of UViTBaoConfig, got 'depht'"),
        ({"family": "UViTBao", "config": {}, "sampler": {"class": "DDMI"}}, "x.sampler: expected a Sampler, .*'DDIM'"),
        ({"family": "UViTBao", "config": {}, "presets": {"a": {"scale": 1.0}}}, "x.presets.a: a classifier and its"),
    ],
)
def test_a_mistake_is_named_by_its_path(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_metadata(data, "x")


# -- licence and origin through everything that makes weights out of weights


class Rows(torch.utils.data.Dataset):
    """Four black images with labels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return {"image": image, "label": torch.tensor(i % 3), "index": torch.tensor(i), "id": torch.tensor(i)}


@pytest.fixture
def nano(own_registry: None) -> str:
    registry.register_model("uvit_nano", UViTBao, CONFIG)
    return "uvit_nano"


def train(run: Path, network: Any = "uvit_nano", **options: Any) -> Path:
    """A step of training; returns the run's folder."""
    import lightning.pytorch as pl

    from diffzoo.training.ema import EMA
    from diffzoo.training.module import DiffusionModule

    module = DiffusionModule(network, process=PROCESS, **options)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=str(run),
        callbacks=[EMA(decays=[0.5], stds=[0.1], snapshot_every=1)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=4))
    trainer.save_checkpoint(run / "checkpoints" / "step_00000001.ckpt")
    return run


def origins(metadata: Metadata) -> list[Base]:
    """The weights that training began from, back to the first."""
    found, base = [], metadata.provenance.base
    while base is not None:
        found.append(base)
        base = base.provenance.base
    return found


def card(source: Path, licence: str | None = None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), source, "someone/x", licence, "ema", None, (), merge=False)
        return (Path(folder) / "README.md").read_text()


def test_a_licence_survives_trainings_adapters_merges_and_exports(nano: str, tmp_path: Path) -> None:
    first = save_pretrained(UViTBao(CONFIG), tmp_path / "first", process=PROCESS, name=nano, licence="research only")
    second = train(tmp_path / "second", weights=str(first))
    third = train(tmp_path / "third", weights=str(second))
    from diffzoo.training.lora import LoRA

    lora = train(tmp_path / "lora", weights=str(third), lora=LoRA(rank=2))
    file = tmp_path / "w.safetensors"
    export(lora, file, dtype="bf16")
    last = train(tmp_path / "last", weights=str(file))
    for source, count in ((second, 1), (third, 2), (lora, 3), (file, 3), (last, 4)):
        known = load_any(source).metadata
        assert known.licence == "research only"
        assert [base.licence for base in origins(known)] == ["research only"] * count
        assert all(base.sha256 and len(base.sha256) == 64 for base in origins(known)), source
        with pytest.raises(UserError, match="states the licence research only, not mit: leave the licence out"):
            push_to_hub(source, "someone/x", licence="mit", dry_run=True, merge=True)
    whole = load_any(lora).metadata.provenance
    assert whole.merged is not None
    assert whole.merged.rank == 2
    text = card(last)
    assert text.count("weights of `uvit_nano` that were not published: research only") == 4
    assert str(tmp_path) not in text


def test_an_ema_made_after_training_keeps_them_too(nano: str, tmp_path: Path) -> None:
    first = save_pretrained(UViTBao(CONFIG), tmp_path / "first", process=PROCESS, name=nano, licence="research only")
    run = train(tmp_path / "run", weights=str(first))
    (file,) = write_reconstructed(str(run), [0.1])
    known = load_any(file).metadata
    assert (known.licence, [base.licence for base in origins(known)]) == ("research only", ["research only"])
    assert known.provenance.reconstructed["std"] == 0.1


def test_a_network_in_memory_remembers_what_it_was_loaded_from(nano: str, tmp_path: Path) -> None:
    """A built network is given to the training instead of a name and weights."""
    first = save_pretrained(UViTBao(CONFIG), tmp_path / "first", process=PROCESS, name=nano, licence="research only")
    run = train(tmp_path / "run", load_any(first).network.train())
    (base,) = origins(load_any(run).metadata)
    assert (base.licence, base.source) == ("research only", str(first / "model.safetensors"))


def test_a_published_base_is_named(nano: str, tmp_path: Path) -> None:
    known = Metadata(
        UViTBao, CONFIG, nano, PROCESS, licence="MIT", provenance=Provenance(repo="a/b", revision="0" * 40)
    )
    network = UViTBao(CONFIG)
    network.metadata = known
    run = train(tmp_path / "run", network)
    assert "Trained from `hf-hub:a/b@0000" in card(run)
    assert "base_model: a/b\n" in card(run)
    assert metadata_of(network).provenance.repo == "a/b"


def test_a_card_says_nothing_that_is_not_known(nano: str, tmp_path: Path) -> None:
    text = card(train(tmp_path / "run"), "mit")
    assert "not published" not in text
    assert "Trained from" not in text
    assert "Licence of the weights: mit." in text


def test_a_resumed_run_keeps_its_origin_without_naming_it_again(nano: str, tmp_path: Path) -> None:
    from diffzoo.training.module import DiffusionModule

    first = save_pretrained(UViTBao(CONFIG), tmp_path / "first", process=PROCESS, name=nano, licence="research only")
    run = train(tmp_path / "run", weights=str(first))
    module = DiffusionModule(nano, process=PROCESS)
    module.on_load_checkpoint(torch.load(run / "checkpoints" / "step_00000001.ckpt", weights_only=True))
    assert module.metadata().licence == "research only"


# -- classes of a user's own

MODULE = """
from dataclasses import dataclass
import torch
from torch import nn
from diffzoo.models import Config, Network
from diffzoo.process import Cosine
from diffzoo.sampling import DDIM

@dataclass(frozen=True)
class Steep(Cosine):
    power: float = 2.0

@dataclass(frozen=True)
class Quick(DDIM):
    steps: int = 2

@dataclass(frozen=True)
class TinyConfig(Config):
    width: int = 4

class Tiny(Network):
    config: TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(config.in_channels, config.in_channels, 1)

    def forward(self, z, noise_level, cond=None):
        return self.conv(z)
"""


def test_a_run_with_classes_of_a_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "my_parts.py").write_text(MODULE)
    with monkeypatch.context() as importable:
        importable.syspath_prepend(tmp_path / "beside")
        import my_parts  # type: ignore[import-not-found]

        from diffzoo.training.module import DiffusionModule

        network = my_parts.Tiny(my_parts.TinyConfig(image_size=8, width=5))
        process = GaussianProcess(my_parts.Steep(power=3.0))
        monkeypatch.setattr(sys.modules[__name__], "PROCESS", process)
        run = train(tmp_path / "run", network, sampler=my_parts.Quick())
        loaded = load_any(run)
        assert loaded.process == process
        assert loaded.metadata.sampler == my_parts.Quick()
        assert loaded.metadata.config == my_parts.TinyConfig(image_size=8, width=5)
        again = DiffusionModule(my_parts.Tiny(my_parts.TinyConfig(image_size=8, width=5)), process=process)
        again.on_load_checkpoint(torch.load(run / "checkpoints" / "step_00000001.ckpt", weights_only=True))
        out = ["--out", str(tmp_path / "x.png"), "--device", "cpu", "--quiet", "--seeds", "0"]
        assert main(["sample", str(run), *out]) == 0
        assert main(["push", str(run), "someone/x", "--licence", "mit", "--dry-run"]) == 0
        assert "whoever loads it needs my_parts" in capsys.readouterr().out
        save_pretrained(loaded.network, tmp_path / "saved")
    sys.modules.pop("my_parts")
    for source in (run, tmp_path / "saved"):
        assert main(["sample", str(source), *out]) == 2
        assert "the class my_parts.Tiny lies in the module my_parts, which cannot be" in capsys.readouterr().err
