"""The manifest: every entry is complete and fits the registry; every mistake is named by file, entry and field."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from zoo_entry import ENTRY

from diffzoo.errors import UserError
from diffzoo.models.registry import entry
from diffzoo.zoo import class_list, list_checkpoints, load_manifest
from diffzoo.zoo.loading import build_meta, entry_config, entry_metadata
from diffzoo.zoo.manifest import checkpoint, manifest_path, read_manifest
from diffzoo.zoo.settings import Setting

NAMES = list_checkpoints()
GOOD = {**ENTRY, "source": {"url": "https://example.org/w.pth"}}

GUIDANCE = {"formula": "cond + s * (cond - uncond)", "scale": 1.0}
TEXT = {"class": "T5Encoder", "source": "a/b", "revision": None}


def read(**changes: Any) -> Any:
    data = copy.deepcopy(GOOD)
    data.update(changes)
    return read_manifest(yaml.safe_dump({"dimr_tiny.test": {k: v for k, v in data.items() if v != "ABSENT"}}), "m.yaml")


# -- the real one


@pytest.mark.parametrize("name", NAMES)
def test_entry_fits_registry_process_sampler_and_converter(name: str) -> None:
    item = checkpoint(name)
    config = entry_config(item)
    metadata = entry_metadata(item, {"sha256": "0"})
    assert metadata.build_config() == config
    assert metadata.build_process() == item.build_process()
    assert metadata.build_sampler().steps > 0
    if item.converter != "diffzoo":
        converter = import_module(f"diffzoo.zoo.converters.{item.converter}")
        assert callable(converter.from_official)
        assert callable(converter.to_official)
    if item.classes:
        assert len(class_list(item.classes)) == config.num_classes


@pytest.mark.parametrize("name", NAMES)
def test_licences_are_stated_separately(name: str) -> None:
    assert checkpoint(name).code_licence
    assert checkpoint(name).weights_licence


@pytest.mark.parametrize("model", ["dimr_xl_256", "dimr_g_256"])
def test_the_first_tag_is_the_default(model: str) -> None:
    assert checkpoint(model).name == f"{model}.in1k"


def test_all_released_dimr_and_uvit_weights_are_there() -> None:
    drive = {item.source.drive for item in load_manifest().values() if item.source.drive}
    assert len(drive) == 10
    assert sum(item.source.repo == "QHL067/DiMR" for item in load_manifest().values()) == 2


@pytest.mark.parametrize("name", [n for n in NAMES if checkpoint(n).converter in ("dimr", "uvit_bao")])
def test_full_size_names_convert_without_remainder_both_ways(name: str) -> None:
    item = checkpoint(name)
    converter = import_module(f"diffzoo.zoo.converters.{item.converter}")
    ours = build_meta(entry(item.model).network, entry_config(item)).state_dict()
    theirs = converter.to_official(ours, entry_config(item))
    back = converter.from_official(theirs, entry_config(item))
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}


def test_every_published_row_of_adm_says_how_it_was_drawn() -> None:
    """The setting against the words of the protocol: steps, kind of sampler, scale, base."""
    rows = [(item, row) for item in load_manifest().values() if item.converter == "guided_diffusion"
            for row in item.published if item.name.startswith("adm") and "lsun" not in item.name]  # fmt: skip
    assert len(rows) > 80
    for item, row in rows:
        setting, words = Setting.from_dict(item.settings[row["setting"]]), row["protocol"]
        steps = (setting.sampler or item.sampler)["steps"]
        base = checkpoint(setting.base) if setting.base else None
        if base is not None:
            drawn = Setting.from_dict(base.settings[setting.base_setting or "plain"])
            assert f"{base.model} {'with classifier' if drawn.classifier else 'without'} guidance" in words
            assert f"{(drawn.sampler or base.sampler)['steps']} + {steps} steps" in words
        else:
            assert f"{steps} {'DDIM ' if setting.sampler else ''}steps" in words
            assert ("no guidance" if setting.scale is None else f"guidance {setting.scale}") in words
        if setting.classifier:
            assert checkpoint(setting.classifier).model == f"adm_classifier_{entry_config(item).image_size}"


def test_manifest_is_found_in_a_checkout_and_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("site/diffzoo/checkpoints.yaml", "checkout/checkpoints.yaml"):
        folder = tmp_path / place.split("/")[0] / "diffzoo" / "zoo"
        folder.mkdir(parents=True)
        (tmp_path / place).write_text("")
        monkeypatch.setattr("diffzoo.zoo.manifest.__file__", str(folder / "manifest.py"))
        assert manifest_path() == tmp_path / place


# -- mistakes


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"model": "ABSENT"}, "model", "missing"),
        ({"model": "other"}, "model", "before the dot"),
        ({"sha256": "ABSENT"}, "sha256", "missing"),
        ({"sha256": "abc"}, "sha256", "64 lower-case hexadecimal"),
        ({"weights_licence": "ABSENT"}, "weights_licence", "missing"),
        ({"weights_licence": None}, "weights_licence", "expected str, got None"),
        ({"unpinned": "ABSENT"}, "unpinned", "why sha256 is null"),
        ({"sise": 3}, "sise", "did you mean 'size'"),
        ({"size": "1.1 GB"}, "size", "expected int or null, got '1.1 GB'"),
        ({"size": True}, "size", "expected int or null, got True"),
        ({"source": {}}, "source", "exactly one of"),
        ({"source": {"url": "u", "drive": "d"}}, "source", "exactly one of"),
        ({"source": {"repo": "a/b", "file": "f"}}, "source.revision", "missing"),
        ({"source": {"repo": "a/b", "file": "f", "revision": "main"}}, "source.revision", "40 lower-case"),
        ({"source": {"repo": "ab", "file": "f", "revision": None}}, "source.repo", "owner/name"),
        ({"source": {"url": 3}}, "source.url", "expected str"),
        ({"process": {"predictoin": "Eps"}}, "process", "did you mean 'prediction'"),
        ({"process": {"schedule": "Cosin"}}, "process", "Cosine"),
        ({"process": {"class": "Cosine"}}, "process", "GaussianProcess"),
        ({"sampler": {"class": "DPMSolve"}}, "sampler", "DPMSolver"),
        ({"sampler": {"class": "DDIM", "step": 3}}, "sampler", "did you mean 'steps'"),
        ({"guidance": {"formula": "cfg", "scale": 1}}, "guidance.formula", "expected one of"),
        ({"guidance": {"formula": "cond + s * (cond - uncond)"}}, "guidance.scale", "missing"),
        ({"guidance": {**GUIDANCE, "decay": 4}}, "guidance.decay", "expected dict, got 4"),
        ({"guidance": {**GUIDANCE, "decay": {"pow": 4}}}, "guidance.decay", "did you mean 'power'"),
        ({"guidance": {**GUIDANCE, "decay": {"power": 0}}}, "guidance.decay", "must be positive"),
        ({"guidance": {**GUIDANCE, "decay": {"class": "DDIM"}}}, "guidance.decay", "says nothing about when"),
        ({"guidance": {**GUIDANCE, "interval": {"low": 1, "high": 0}}}, "guidance.interval", "low < high"),
        ({"guidance": {**GUIDANCE, "decya": {}}}, "guidance.decya", "did you mean 'decay'"),
        ({"companions": {"text_encoder": {"class": "T5Encoder", "source": "a/b"}}}, "companions.text_encoder.revision",
         "missing"),
        ({"companions": {"text_encoder": {**TEXT, "revision": "main"}}}, "companions.text_encoder.revision",
         "40 lower-case"),
        ({"companions": {"text_encoder": {**TEXT, "class": "Bert"}}}, "companions.text_encoder.class",
         "expected one of"),
        ({"companions": {"text_encoder": {**TEXT, "max_tokens": "77"}}}, "companions.text_encoder.max_tokens",
         "expected int"),
        ({"companions": {"text_encoder": TEXT}, "sha256": "0" * 64, "unpinned": "ABSENT"}, "unpinned",
         "why the text encoder's revision is null"),
        ({"companions": {"vae": {}}}, "companions.vae", "unknown field"),
        ({"companions": {"autoencoder": {"repo": "a/b", "revision": None}}}, "companions.autoencoder.scaling_factor",
         "missing"),
        ({"settings": {"a": {"scal": 1}}}, "settings.a", "did you mean 'scale'"),
        ({"settings": {"a": {"scale": 1.0}}}, "settings.a", "belong together"),
        ({"settings": {"a": {"sampler": {"class": "DDMI"}}}}, "settings.a.sampler", "did you mean 'DDIM'"),
        ({"settings": {"a": {"base_setting": "b"}}}, "settings.a", "name the base too"),
        ({"settings": {"a": {"labels": "all"}}}, "settings.a", "'uniform' or 'balanced'"),
        ({"settings": {"a": {"classifier": "adm_c", "scale": 1.0}}}, "settings.a.classifier", "no entry is called"),
        ({"settings": {"a": {"base": "dimr_tiny", "base_setting": "b"}}}, "settings.a.base_setting",
         "dimr_tiny has no setting 'b'"),
        ({"published": [{"metric": "FID", "value": 1, "protocol": "p", "setting": "b"}]}, "published.0.setting",
         "no setting 'b'"),
        ({"published": [{"metric": "FID", "value": 1}]}, "published.0.protocol", "missing"),
        ({"fingerprint": {"mean": 0.0}}, "fingerprint.std", "missing"),
        ({"fingerprint": {"mean": 0.0, "std": 1.0, "first": ["x"]}}, "fingerprint.first", "expected int or float"),
        ({"fingerprint": None}, "fingerprint", "expected dict"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_entry_and_field(changes: dict[str, Any], field: str, problem: str) -> None:
    read()  # the entry without the mistake is fine
    with pytest.raises(UserError) as error:
        read(**changes)
    message = str(error.value)
    assert message.startswith(f"m.yaml: entry 'dimr_tiny.test', field '{field}': ")
    assert problem in message


VAE = {"repo": "a/b", "revision": None, "scaling_factor": 1.0}
ROW = {"metric": "FID", "value": 1.0, "protocol": "p"}
MARK = {"mean": 0.0, "std": 1.0, "first": [0.0]}
NAN = float("nan")
BETAS = {"class": "DiscreteBetas", "kind": "scaled_linear"}


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"guidance": {**GUIDANCE, "formula": []}}, "guidance.formula", "expected str, got []"),
        ({"guidance": {**GUIDANCE, "formula": {}}}, "guidance.formula", "expected str, got {}"),
        ({"guidance": {**GUIDANCE, "scale": NAN}}, "guidance.scale", "expected a finite number, got nan"),
        ({"guidance": {**GUIDANCE, "decay": {"power": "x"}}}, "guidance.decay.power", "expected float, got 'x'"),
        ({"converter": "dmir"}, "converter", "no converter is called 'dmir'; did you mean 'dimr'"),
        ({"size": -1}, "size", "expected a positive number, got -1"),
        ({"size": 0}, "size", "expected a positive number, got 0"),
        ({"class_names": "x"}, "class_names", "expected a list of names, or one of ['imagenet-1k'], got 'x'"),
        ({"class_names": ["a", True]}, "class_names.1", "expected str or int, got True"),
        ({"config": {"a": 1}}, "config.a", "unknown field"),
        ({"config": {"num_class": 1}}, "config.num_class", "did you mean 'num_classes'"),
        ({"config": {"num_classes": "x"}}, "config.num_classes", "expected int, got 'x'"),
        ({"config": {"num_classes": True}}, "config.num_classes", "expected int, got True"),
        ({"process": {}}, "process.prediction", "missing"),
        ({"process": {"prediction": "Eps", "schedule": {**BETAS, "beta_start": -1}}}, "process.schedule", ""),
        ({"process": {"prediction": "Eps", "schedule": {**BETAS, "kind": "linear", "beta_start": -1}}},
         "process.schedule", "the log SNR must fall from data to noise"),
        ({"process": {"prediction": "Eps", "schedule": {"class": "DiscreteBetas", "kind": "line"}}},
         "process.schedule.kind", "expected one of 'linear', 'scaled_linear', 'cosine', got 'line'"),
        ({"process": {"prediction": "Eps", "noise_conditioning": {"class": "TimeConditioning", "scale": "x"}}},
          "process.noise_conditioning.scale",
         "expected float, got 'x'"),
        ({"process": {"prediction": "Eps", "learned_variance": 1}}, "process.learned_variance", "expected bool, got 1"),
        ({"process": {"prediction": "Eps", "schedule": 3}}, "process.schedule", "expected a Schedule, got 3"),
        ({"sampler": {"class": "DDIM", "steps": 3.5}}, "sampler.steps", "expected int, got 3.5"),
        ({"sampler": {"class": "DDIM", "grid": "Nope"}}, "sampler.grid", "expected a Grid, got 'Nope'"),
        ({"sampler": {"class": "DDIM", "grid": {"class": "UniformTim"}}}, "sampler.grid", "did you mean 'UniformTime'"),
        ({"sampler": {"class": "DDIM", "grid": {"class": "DDIM"}}}, "sampler.grid", "expected a Grid"),
        ({"sampler": {"class": "Karras"}}, "sampler", "expected a sampler"),
        ({"settings": {"a": {"sampler": {"class": "DDIM", "steps": "x"}}}}, "settings.a.sampler.steps", "expected int"),
        ({"settings": {"a": {"classifier": 3, "scale": 1.0}}}, "settings.a.classifier", "expected str or null, got 3"),
        ({"settings": {"a": {"classifier": "b", "scale": "x"}}}, "settings.a.scale", "expected float or null"),
        ({"companions": {"autoencoder": {**VAE, "scaling_factor": -1}}}, "companions.autoencoder.scaling_factor",
         "expected a positive number, got -1"),
        ({"companions": {"autoencoder": {**VAE, "scaling_factor": NAN}}}, "companions.autoencoder.scaling_factor",
         "expected a finite number, got nan"),
        ({"companions": {"autoencoder": {**VAE, "repo": 3}}}, "companions.autoencoder.repo", "expected str, got 3"),
        ({"companions": {"autoencoder": {**VAE, "subfolder": 3}}}, "companions.autoencoder.subfolder", "expected str"),
        ({"companions": {"text_encoder": {**TEXT, "max_tokens": 0}}}, "companions.text_encoder.max_tokens", "positive"),
        ({"published": [{**ROW, "value": "x"}]}, "published.0.value", "expected int or float, got 'x'"),
        ({"published": [{**ROW, "value": NAN}]}, "published.0.value", "expected a finite number"),
        ({"published": [{**ROW, "metric": 3}]}, "published.0.metric", "expected str, got 3"),
        ({"published": [3]}, "published.0", "expected a mapping, got 3"),
        ({"fingerprint": {**MARK, "first": []}}, "fingerprint.first", "expected the first values"),
        ({"fingerprint": {**MARK, "tolerance": 0.0}}, "fingerprint.tolerance", "positive"),
        ({"source": {"url": ""}}, "source.url", "expected text, got ''"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_too(tiny: Any, changes: dict[str, Any], field: str, problem: str) -> None:
    good = {
        "companions": {"autoencoder": VAE, "text_encoder": TEXT},
        "published": [ROW],
        "fingerprint": MARK,
        "size": 3,
    }
    read(**good, settings={"a": {}}, config={"num_classes": 7}, sampler={"class": "DDIM", "grid": "Karras"})
    with pytest.raises(UserError) as error:
        read(**changes)
    message = str(error.value)
    assert message.startswith(f"m.yaml: entry 'dimr_tiny.test', field '{field}': ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("  size: 3\n  size: 4\n", "entry 'dimr_tiny.test', field 'size'"),
        ("  sampler: {class: DDIM, steps: 3, steps: 4}\n", "entry 'dimr_tiny.test', field 'sampler.steps'"),
        ("  published:\n  - {metric: FID, metric: IS}\n", "entry 'dimr_tiny.test', field 'published.0.metric'"),
        ("dimr_tiny.test: {}\n", "entry 'dimr_tiny.test'"),
    ],
)
def test_what_stands_twice_is_named(extra: str, where: str) -> None:
    data = {k: v for k, v in GOOD.items() if k != "sampler"}
    text = yaml.safe_dump({"dimr_tiny.test": data})
    read_manifest(text, "m.yaml")
    line = (text + extra).rstrip().count("\n") + 1
    with pytest.raises(UserError) as error:
        read_manifest(text + extra, "m.yaml")
    assert str(error.value) == f"m.yaml: {where}: stands twice, for the second time in line {line}"


@pytest.mark.parametrize("text", ["a: [", "- a\n- b"])
def test_what_is_not_a_mapping_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^m\.yaml: "):
        read_manifest(text, "m.yaml")


@pytest.mark.parametrize("name", ["dimr_tiny", "DiMR.x", "a.b.c"])
def test_names_are_model_dot_tag(name: str) -> None:
    with pytest.raises(UserError, match=f"entry '{name}'"):
        read_manifest(yaml.safe_dump({name: GOOD}), "m.yaml")


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'dimr_xl_256'"):
        checkpoint("dimr_xl_25")
    with pytest.raises(UserError, match="no weights tagged 'in2k'; there are dimr_xl_256"):
        checkpoint("dimr_xl_256.in2k")
