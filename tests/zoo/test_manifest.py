"""The manifest: every entry is complete and fits the registry; the check names every mistake by its path."""

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_manifest import check
from zoo_entry import ENTRY

from diffzoo.errors import UserError
from diffzoo.zoo import class_list, list_pretrained, load_manifest
from diffzoo.zoo.building import build_meta
from diffzoo.zoo.manifest import find_pretrained, manifest_path, parse_manifest
from diffzoo.zoo.metadata import read_metadata

NAMES = list_pretrained()
GOOD = {**ENTRY, "source": {"url": "https://example.org/w.pth"}}


def problems(**changes: Any) -> list[str]:
    data = copy.deepcopy(GOOD)
    data.update(changes)
    return check(yaml.safe_dump({"dimr_tiny.test": {k: v for k, v in data.items() if v != "ABSENT"}}), "m.yaml")


# -- the real one


def test_nothing_is_wrong() -> None:
    assert check(manifest_path().read_text()) == []


@pytest.mark.parametrize("name", NAMES)
def test_entry_fits_registry_process_sampler_and_converter(name: str) -> None:
    item = find_pretrained(name)
    metadata = item.metadata
    assert read_metadata(json.loads(json.dumps(metadata.to_plain())), "the entry") == metadata
    assert metadata.default_sampler.steps > 0
    assert item.code_licence
    assert metadata.licence
    if item.converter != "diffzoo":
        converter = import_module(f"diffzoo.zoo.converters.{item.converter}")
        assert callable(converter.from_official)
        assert callable(converter.to_official)
    if metadata.class_names:
        assert len(class_list(metadata.class_names)) == metadata.config.num_classes


def test_entries_are_read_when_they_are_asked_for(tiny: Any) -> None:
    """Users never edit the file, so nobody pays for checking all of it; a mistake spoils its own entry alone."""
    entries = parse_manifest(
        yaml.safe_dump({"dimr_tiny.test": GOOD}) + yaml.safe_dump({"dimr_tiny.wrong": {**GOOD, "size": "x"}})
    )
    assert list(entries) == ["dimr_tiny.test", "dimr_tiny.wrong"]
    assert entries["dimr_tiny.test"].model == "dimr_tiny"
    with pytest.raises(UserError, match=r"dimr_tiny\.wrong\.size: expected a whole number or null"):
        entries["dimr_tiny.wrong"]


@pytest.mark.parametrize("model", ["dimr_xl_256", "dimr_g_256"])
def test_the_first_tag_is_the_default(model: str) -> None:
    assert find_pretrained(model).name == f"{model}.in1k"


def test_all_released_dimr_and_uvit_weights_are_there() -> None:
    drive = {item.source.drive for item in load_manifest().values() if item.source.drive}
    assert len(drive) == 10
    assert sum(item.source.repo == "QHL067/DiMR" for item in load_manifest().values()) == 2


@pytest.mark.parametrize("name", [n for n in NAMES if find_pretrained(n).converter in ("dimr", "uvit_bao")])
def test_full_size_names_convert_without_remainder_both_ways(name: str) -> None:
    item = find_pretrained(name)
    converter = import_module(f"diffzoo.zoo.converters.{item.converter}")
    ours = build_meta(item.metadata.network, item.config).state_dict()
    theirs = converter.to_official(ours, item.config)
    back = converter.from_official(theirs, item.config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}


def test_every_published_row_of_adm_says_how_it_was_sampled() -> None:
    """The preset against the words of the protocol: steps, kind of sampler, scale, base."""
    rows = [(item, row) for item in load_manifest().values() if item.converter == "guided_diffusion"
            for row in item.published if item.name.startswith("adm") and "lsun" not in item.name]  # fmt: skip
    assert len(rows) > 80
    for item, row in rows:
        preset, words = item.metadata.presets[str(row.preset)], row.protocol
        steps = (preset.sampler or item.metadata.default_sampler).steps
        if preset.base is not None:
            base = find_pretrained(preset.base).metadata
            used = base.presets[preset.base_preset or "plain"]
            assert f"{base.name} {'with classifier' if used.classifier else 'without'} guidance" in words
            assert f"{(used.sampler or base.default_sampler).steps} + {steps} steps" in words
        else:
            assert f"{steps} {'DDIM ' if preset.sampler else ''}steps" in words
            assert ("no guidance" if preset.scale is None else f"guidance {preset.scale}") in words
        if preset.classifier:
            assert find_pretrained(preset.classifier).model == f"adm_classifier_{item.config.image_size}"


def test_manifest_is_found_in_a_checkout_and_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("site/diffzoo/checkpoints.yaml", "checkout/checkpoints.yaml"):
        folder = tmp_path / place.split("/")[0] / "diffzoo" / "zoo"
        folder.mkdir(parents=True)
        (tmp_path / place).write_text("")
        monkeypatch.setattr("diffzoo.zoo.manifest.__file__", str(folder / "manifest.py"))
        assert manifest_path() == tmp_path / place


# -- mistakes

GUIDANCE = {"formula": "cond + s * (cond - uncond)", "scale": 1.0}
TEXT = {"class": "T5Encoder", "source": "a/b", "revision": None}
VAE = {"repo": "a/b", "revision": None, "scaling_factor": 1.0}
ROW = {"metric": "FID", "value": 1.0, "protocol": "p"}
MARK = {"mean": 0.0, "std": 1.0, "first": [0.0]}
NAN = float("nan")
LINEAR = {"class": "DiscreteBetas", "kind": "linear", "beta_start": -1}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "ABSENT"}, "model: expected the name of a registered model"),
        ({"sha256": "abc"}, "sha256: expected 64 lower-case hexadecimal"),
        ({"weights_licence": "ABSENT"}, "weights_licence: missing"),
        ({"unpinned": "ABSENT"}, "unpinned: missing: it must say why sha256 is null"),
        ({"sise": 3}, "expected fields of Pretrained, got 'sise'; did you mean 'size'"),
        ({"size": "1.1 GB"}, "size: expected a whole number or null, got '1.1 GB'"),
        ({"size": 0}, "size: expected a positive number, got 0"),
        ({"source": {}}, "source: expected exactly one of"),
        ({"source": {"url": "u", "drive": "d"}}, "source: expected exactly one of"),
        ({"source": {"repo": "a/b", "file": "f", "revision": "main"}}, "source.revision: expected 40 lower-case"),
        ({"source": {"repo": "ab", "file": "f"}}, "source.repo: expected 'owner/name'"),
        ({"process": "ABSENT"}, "process: missing"),
        ({"process": {"schedule": "Cosin"}}, "process.schedule: expected a Schedule, got 'Cosin'"),
        ({"process": {"schedule": LINEAR}}, "process.schedule: the log SNR must fall from data to noise"),
        ({"sampler": {"class": "DDIM", "steps": 3.5}}, "sampler.steps: expected a whole number, got 3.5"),
        ({"sampler": {"class": "DDIM", "grid": {"class": "DDIM"}}}, "sampler.grid: expected a Grid, got 'DDIM'"),
        ({"guidance": {"formula": "cfg", "scale": 1}}, "guidance.formula: expected one of 'uncond', 'cond', got 'cfg'"),
        ({"guidance": {"formula": "cond"}}, "guidance.scale: expected"),
        ({"guidance": {**GUIDANCE, "scale": NAN}}, "guidance: guidance needs a finite scale, got nan"),
        ({"guidance": {**GUIDANCE, "decay": {"power": 0}}}, "guidance.decay: the power of the guidance decay must be"),
        ({"guidance": {**GUIDANCE, "decay": {"class": "DDIM"}}}, "guidance.decay: expected a GuidanceSchedule"),
        ({"text_encoder": {**TEXT, "class": "Bert"}}, "text_encoder.class: expected one of 'CLIPEncoder'"),
        ({"text_encoder": {**TEXT, "revision": "main"}}, "text_encoder.revision: expected 40 lower-case"),
        ({"text_encoder": {**TEXT, "max_tokens": 0}}, "text_encoder.max_tokens: expected a positive number, got 0"),
        ({"autoencoder": {"repo": "a/b"}}, "autoencoder.scaling_factor: expected a number, but it is missing"),
        ({"autoencoder": {**VAE, "scaling_factor": -1}}, "autoencoder.scaling_factor: expected a positive number"),
        ({"autoencoder": VAE, "sha256": "0" * 64, "unpinned": "ABSENT"}, "why autoencoder.revision is null"),
        ({"presets": {"a": {"scale": 1.0}}}, "presets.a: a classifier and its scale belong together"),
        ({"presets": {"a": {"base_preset": "b"}}}, "presets.a: base_preset says how the base samples"),
        ({"presets": {"a": {"classifier": "adm_c", "scale": 1.0}}}, "presets.a.classifier: no entry is called 'adm_c'"),
        ({"presets": {"a": {"base": "dimr_tiny", "base_preset": "b"}}}, "presets.a.base_preset: dimr_tiny has no"),
        ({"published": [{**ROW, "preset": "b"}]}, "published.0.preset: no preset 'b'"),
        ({"published": [{"metric": "FID", "value": 1}]}, "published.0.protocol: expected text, but it is missing"),
        ({"fingerprint": {"mean": 0.0}, "fingerprint_pending": "ABSENT"}, "fingerprint.std: expected a number"),
        ({"fingerprint_pending": "ABSENT"}, "fingerprint: expected the recorded output"),
        ({"fingerprint": MARK}, "fingerprint: expected the recorded output"),
        ({"config": {"num_class": 1}}, "config: DiMRConfig has no argument 'num_class'; did you mean 'num_classes'"),
        ({"config": {"num_classes": "x"}}, "config.num_classes: expected a whole number, got 'x'"),
        ({"converter": "dmir"}, "converter: no converter is called 'dmir'; did you mean 'dimr'"),
        ({"class_names": "x"}, "class_names: expected a list of names, or one of ['imagenet-1k'], got 'x'"),
        ({"class_names": ["a", True]}, "class_names: expected a list or text"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_path(tiny: Any, changes: dict[str, Any], problem: str) -> None:
    assert problems() == []
    (found,) = problems(**changes)
    assert found.startswith("m.yaml: dimr_tiny.test")
    assert problem in found
    assert "\n" not in found


def test_all_fields_that_an_entry_may_have_are_accepted(tiny: Any) -> None:
    known = {"autoencoder": VAE, "text_encoder": TEXT, "published": [ROW], "fingerprint": MARK, "size": 3}
    sampler = {"class": "DDIM", "grid": "Karras"}
    more = {"presets": {"a": {}}, "config": {"num_classes": 7}, "sampler": sampler, "fingerprint_pending": "ABSENT"}
    assert problems(**known, **more) == []


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("  size: 3\n  size: 4\n", "dimr_tiny.test.size"),
        ("  sampler: {class: DDIM, steps: 3, steps: 4}\n", "dimr_tiny.test.sampler.steps"),
        ("  published:\n  - {metric: FID, metric: IS, value: 1, protocol: p}\n", "dimr_tiny.test.published.0.metric"),
    ],
)
def test_what_stands_twice_is_named(tiny: Any, extra: str, where: str) -> None:
    text = yaml.safe_dump({"dimr_tiny.test": {k: v for k, v in GOOD.items() if k != "sampler"}})
    line = (text + extra).rstrip().count("\n") + 1
    assert check(text + extra, "m.yaml") == [f"m.yaml: {where}: it stands twice, for the second time in line {line}"]


@pytest.mark.parametrize("text", ["a: [", "- a\n- b"])
def test_what_is_not_a_mapping_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^m\.yaml: "):
        dict(parse_manifest(text, "m.yaml"))


@pytest.mark.parametrize("name", ["dimr_tiny", "DiMR.x", "a.b.c"])
def test_names_are_model_dot_tag(tiny: Any, name: str) -> None:
    found = check(yaml.safe_dump({name: GOOD}), "m.yaml")
    assert any(problem.startswith(f"m.yaml: {name}.name: expected 'model.tag'") for problem in found)


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'dimr_xl_256'"):
        find_pretrained("dimr_xl_25")
    with pytest.raises(UserError, match="no weights tagged 'in2k'; there are dimr_xl_256"):
        find_pretrained("dimr_xl_256.in2k")
