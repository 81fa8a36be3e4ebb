"""ADM from a name to images: guided by a classifier, enlarged by an upsampler, in Python and on the command line."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import perturbed
from PIL import Image

from diffzoo import pipeline
from diffzoo.cli.main import main
from diffzoo.demo import job
from diffzoo.demo.ask import Ask
from diffzoo.demo.job import Stopped, Update, Watch
from diffzoo.errors import UserError
from diffzoo.generation import Pipeline
from diffzoo.models import registry
from diffzoo.models.adm import TINY, TINY_CLASSIFIER, ADMClassifier, ADMUNet
from diffzoo.models.base import Network
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess, TimeConditioning
from diffzoo.sampling import ClassifierGuidance, Denoiser, RespacedAncestral, sample
from diffzoo.typing import Condition
from diffzoo.zoo import Loaded, load_any, locate, metadata_of, save_pretrained
from diffzoo.zoo.building import Weights
from diffzoo.zoo.metadata import read_metadata

PROCESS = GaussianProcess(
    DiscreteBetas("linear"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0), learned_variance=True
)
SAMPLER = {"class": "RespacedAncestral", "steps": 3}


def saved(network: Network, folder: Path) -> str:
    torch.manual_seed(0)
    save_pretrained(perturbed(network).eval(), folder, process=PROCESS, sampler=SAMPLER)  # type: ignore[operator]
    return str(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adm")
    networks = {
        "small": ADMUNet(TINY),
        "free": ADMUNet(TINY.override(num_classes=0)),
        "large": ADMUNet(TINY.override(upsampler=True, image_size=32)),
        "classifier": ADMClassifier(TINY_CLASSIFIER),
        "other_classifier": ADMClassifier(TINY_CLASSIFIER.override(image_size=32)),
    }
    return {name: saved(network, root / name) for name, network in networks.items()}


@pytest.mark.parametrize("name", ["small", "free"])
def test_a_classifier_guides(zoo: dict[str, str], name: str) -> None:
    pipe = pipeline(zoo[name], "cpu", classifier=zoo["classifier"])
    got = pipe([1, 7], seeds=[5], guidance=30.0)
    classifier = pipe.generator.classifier
    guided = ClassifierGuidance(Denoiser(pipe.network, PROCESS), classifier, 30.0, conditional=name == "small")
    want = sample(guided, RespacedAncestral(3), (3, 16, 16), [5, 5], Condition(label=torch.tensor([1, 7])))
    pixels = ((want.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(got.pixels.astype(int) - pixels.astype(int)).max() <= 1
    assert got.records[0]["guidance"]["scale"] == 30.0
    assert not np.array_equal(got.pixels, pipe([1, 7], seeds=[5], guidance=0.0).pixels)


def test_bad_classifiers_and_classes(zoo: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is no classifier"):
        pipeline(zoo["small"], "cpu", classifier=zoo["free"])
    with pytest.raises(UserError, match="reads images of 32 px, this model samples 16 px"):
        pipeline(zoo["small"], "cpu", classifier=zoo["other_classifier"])
    with pytest.raises(UserError, match="unconditional: leave out the classes"):
        pipeline(zoo["free"], "cpu")([1], seeds=[0])
    with pytest.raises(UserError, match="class 10 is out of range: this model has classes 0 to 9"):
        pipeline(zoo["small"], "cpu")([10], seeds=[0])
    with pytest.raises(UserError, match="'ddim36' or 'ddim38'"):
        pipeline(zoo["small"], "cpu")([1], seeds=[0], sampler="RespacedDDIM", steps=37)
    with pytest.raises(UserError, match="no null class"):
        pipeline(zoo["small"], "cpu")([1], seeds=[0], guidance=2.0)


def test_an_upsampler_enlarges(zoo: dict[str, str]) -> None:
    small = pipeline(zoo["small"], "cpu")([1, 2], seeds=[3, 4])
    pipe = pipeline(zoo["large"], "cpu")
    assert "samples from a image" in repr(pipe)
    large = pipe.upsample(small, [1, 1, 2, 2], [3, 4, 3, 4])
    assert large.pixels.shape == (4, 32, 32, 3)
    assert (large.columns, [r["seed"] for r in large.records]) == (2, [3, 4, 3, 4])
    alone = pipe.upsample(small.pixels[3:], [2], [4])
    assert np.abs(alone.pixels[0].astype(int) - large.pixels[3].astype(int)).max() <= 1
    with pytest.raises(UserError, match="expected 4 seeds and classes, one per image, got 4 and 1"):
        pipe.upsample(small, [1], [3, 4, 3, 4])
    with pytest.raises(UserError, match="does not enlarge images"):
        pipeline(zoo["small"], "cpu").upsample(small, [1], [3])
    with pytest.raises(UserError, match="needs low-resolution images"):
        pipe([1], seeds=[0])


def test_the_whole_chain_on_the_command_line(zoo: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = ["sample", zoo["free"], "--classes", "1", "2", "--seeds", "0-1", "--classifier", zoo["classifier"]]
    arguments += ["--guidance", "2", "--upsample", zoo["large"], "--upsample-steps", "2", "--device", "cpu", "--quiet"]
    assert main([*arguments, "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.width == 2 * 4 * 32 + 3 * 2  # two images of 32 px, shown fourfold, margins of 2


# -- settings


@pytest.fixture
def published(zoo: dict[str, str], own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names for the networks above, as the manifest knows them, with settings."""
    names = {"small": "adm_16", "free": "adm_16_uncond", "large": "adm_16_to_32", "classifier": "adm_classifier_16"}
    settings: dict[str, dict[str, dict]] = {
        "small": {
            "plain": {},
            "guided": {"classifier": "adm_classifier_16", "scale": 20.0},
            "ddim2": {
                "sampler": {"class": "RespacedDDIM", "steps": 2},
                "classifier": "adm_classifier_16",
                "scale": 9.0,
            },
        },
        "large": {"plain": {"base": "adm_16"}, "guided": {"base": "adm_16", "base_setting": "guided"}},
    }
    entries: dict[str, Weights] = {}
    for place, name in names.items():
        found = locate(zoo[place])
        kind = "classifier" if place == "classifier" else "denoiser"
        registry.register_model(name, found.metadata.network, found.metadata.config, kind=kind)
        metadata = read_metadata(
            {**found.metadata.to_plain(), "name": name, "settings": settings.get(place, {})}, name
        )  # as earlier versions wrote it
        assert read_metadata(json.loads(json.dumps(metadata.to_plain())), name) == metadata
        entries[name] = Weights(found.state, metadata, name)
    monkeypatch.setattr("diffzoo.zoo.loading.find_pretrained", lambda name: name)
    monkeypatch.setattr("diffzoo.zoo.loading.entry_weights", entries.__getitem__)


def test_a_setting_brings_classifier_scale_and_sampler(published: None) -> None:
    by_hand = pipeline("adm_16", "cpu", classifier="adm_classifier_16")
    images = {name: pipeline("adm_16", "cpu", preset=name)([1, 7], seeds=[5]) for name in ("plain", "guided", "ddim2")}
    assert np.array_equal(images["guided"].pixels, by_hand([1, 7], seeds=[5], guidance=20.0).pixels)
    assert np.array_equal(images["guided"].pixels, by_hand([1, 7], seeds=[5]).pixels)  # the published scale
    ddim = by_hand([1, 7], seeds=[5], guidance=9.0, sampler="RespacedDDIM", steps=2)
    assert np.array_equal(images["ddim2"].pixels, ddim.pixels)
    assert np.array_equal(images["plain"].pixels, pipeline("adm_16", "cpu")([1, 7], seeds=[5]).pixels)
    assert len({p.pixels.tobytes() for p in images.values()}) == 3
    with pytest.raises(UserError, match="no preset is called 'giuded'; did you mean 'guided'"):
        pipeline("adm_16", "cpu", preset="giuded")
    with pytest.raises(UserError, match="these weights have none"):
        pipeline("adm_16_uncond", "cpu", preset="guided")


def test_an_upsampler_samples_its_small_images_itself(published: None, tmp_path: Path) -> None:
    for setting, small_setting in ((None, None), ("guided", "guided")):
        small = pipeline("adm_16", "cpu", preset=small_setting)([1, 2], seeds=[3, 4])
        pipe = pipeline("adm_16_to_32", "cpu", preset=setting)
        want = pipe.upsample(small, [1, 1, 2, 2], [3, 4, 3, 4], batch_size=4)
        got = pipe([1, 2], seeds=[3, 4])
        assert np.abs(got.pixels.astype(int) - want.pixels.astype(int)).max() <= 1
        assert got.records[3]["enlarged"] == small.records[3]
        assert (got.columns, got.records[3]["seed"]) == (2, 4)
    arguments = ["sample", "adm_16_to_32", "--preset", "guided", "--seeds", "3", "--classes", "1", "--quiet"]
    assert main([*arguments, "--device", "cpu", "--dir", str(tmp_path / "a"), "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(next((tmp_path / "a").iterdir())) as image:
        want = pipeline("adm_16_to_32", "cpu", preset="guided")(1, seeds=[3])
        assert np.abs(np.asarray(image).astype(int) - want.pixels[0].astype(int)).max() <= 1


def test_a_cascade_on_the_page_shows_both_sizes_and_stops_in_its_upsampler(
    published: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "EVERY", 0.0)
    pipe = pipeline("adm_16_to_32", "cpu")
    asked = Ask("adm_16_to_32", "cpu", classes=(1,), seeds="3,4", steps=6)
    asked.check(pipe)
    with pytest.raises(UserError, match="samples from a class: choose one"):
        Ask("adm_16_to_32", "cpu").check(pipe)
    updates: list[Update] = []
    stop = threading.Event()
    watch = Watch(2, updates.append, stop)
    assert np.array_equal(asked.sampled(pipe, watch).pixels, pipe([1], seeds=[3, 4], steps=6).pixels)
    assert [(u.pixels.shape[-1], round(6 * u.done)) for u in updates] == [(16, k) for k in range(1, 7)] + [
        (32, k) for k in range(1, 7)
    ]

    def stop_once_large(update: Update) -> None:
        if update.pixels.shape[-1] == 32:
            stop.set()

    with pytest.raises(Stopped):
        asked.sampled(pipe, Watch(2, stop_once_large, stop))


def test_a_classifier_samples_nothing(zoo: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is a classifier and samples nothing: guide a model"):
        pipeline(zoo["classifier"], "cpu")
    cosine = GaussianProcess(
        DiscreteBetas("cosine"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0)
    )
    other = ADMClassifier(TINY_CLASSIFIER)
    small, guide = load_any(zoo["small"]), Loaded(other, replace(metadata_of(other), process=cosine))
    with pytest.raises(UserError, match="was trained on another noise schedule"):
        Pipeline(small, "cpu", classifier=guide)
