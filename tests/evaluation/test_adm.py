"""Evaluation of pixel-space chains: guided by a classifier, enlarged by an upsampler, by preset or by flag."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from networks import perturbed
from torch import Tensor

from diffzoo import Condition, GaussianProcess
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.evaluation import Result, SamplePlan
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.evaluation.sweep import Candidate
from diffzoo.generation.guidance import ByClassifier
from diffzoo.generation.plan import default_plan
from diffzoo.models.adm import TINY, TINY_CLASSIFIER, ADMClassifier, ADMUNet
from diffzoo.models.base import Network
from diffzoo.process import DiscreteBetas, Eps, TimeConditioning
from diffzoo.sampling import ClassifierGuidance, Denoiser, RespacedAncestral, RespacedDDIM, sample, upsample
from diffzoo.zoo import load_any, save_pretrained

PROCESS = GaussianProcess(
    DiscreteBetas("linear"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0), learned_variance=True
)
SAMPLER = {"class": "RespacedAncestral", "steps": 3}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adm")
    names = {k: str(root / k) for k in ("small", "free", "large", "classifier")}
    guided = {"classifier": names["classifier"], "scale": 6.0, "labels": "uniform"}
    presets = {
        "small": {"guided": guided, "ddim2": {**guided, "sampler": {"class": "RespacedDDIM", "steps": 2}}},
        "large": {"plain": {"base": names["small"]}, "guided": {"base": names["small"], "base_preset": "guided"}},
    }
    networks: dict[str, Network] = {
        "small": ADMUNet(TINY),
        "free": ADMUNet(TINY.override(num_classes=0)),
        "large": ADMUNet(TINY.override(upsampler=True, image_size=32)),
        "classifier": ADMClassifier(TINY_CLASSIFIER),
    }
    torch.manual_seed(0)
    for name, network in networks.items():
        made = {"process": PROCESS, "sampler": SAMPLER, "presets": presets.get(name, {}), "licence": "mit"}
        save_pretrained(perturbed(network).eval(), names[name], **made)
    return names


def sampled(zoo: dict[str, str], network: str, labels: Tensor, seeds: range, sampler: object, scale: float) -> Tensor:
    """The parts put together by hand."""
    model, classifier = load_any(zoo[network]).network, load_any(zoo["classifier"]).network
    told = network == "small"
    denoise = ClassifierGuidance(Denoiser(model, PROCESS), classifier, scale, conditional=told)
    return sample(denoise, sampler, (3, 16, 16), seeds, Condition(label=labels), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "sampler"), [("guided", RespacedAncestral(3)), ("ddim2", RespacedDDIM(2))], ids=["guided", "ddim2"]
)
def test_a_preset_is_a_plan(zoo: dict[str, str], preset: str, sampler: object) -> None:
    plan = default_plan(zoo["small"], load_any(zoo["small"]).metadata, preset, first_seed=5)
    images = ModelImages(plan)
    labels = images.condition(0, 4).label  # type: ignore[union-attr]
    assert plan.labels == "uniform"
    torch.testing.assert_close(
        images.images(0, 4), sampled(zoo, "small", labels, range(5, 9), sampler, 6.0), rtol=1e-3, atol=1e-3
    )
    resolved = images.plan()
    assert resolved.guidance is not None
    assert resolved.guidance.classifier_sha256 != resolved.weights_sha256
    assert SamplePlan.from_dict(resolved.to_dict()) == resolved
    changed = {**resolved.to_dict()["guidance"], "classifier_sha256": "0" * 64}
    with pytest.raises(UserError, match="the plan was made for weights 0000"):
        ModelImages(SamplePlan.from_dict({**resolved.to_dict(), "guidance": changed})).plan()


def test_a_classifier_chooses_classes_for_an_unconditional_network(zoo: dict[str, str]) -> None:
    metadata = load_any(zoo["free"]).metadata
    guidance = {"classifier": zoo["classifier"], "scale": 4.0}
    images = ModelImages(default_plan(zoo["free"], metadata, guidance=guidance, labels="balanced", classes=(3, 7)))
    assert images.num_classes == 10
    want = sampled(zoo, "free", torch.tensor([3, 7, 3]), range(3), RespacedAncestral(3), 4.0)
    torch.testing.assert_close(images.images(0, 3), want, rtol=1e-3, atol=1e-3)
    images.plan()


def test_an_upsampler_enlarges_the_images_of_the_same_seeds_and_classes(zoo: dict[str, str]) -> None:
    metadata = load_any(zoo["large"]).metadata
    images = pickle.loads(pickle.dumps(ModelImages(default_plan(zoo["large"], metadata, "guided", labels="balanced"))))
    labels = torch.tensor([0, 1, 2])
    small = sampled(zoo, "small", labels, range(3), RespacedAncestral(3), 6.0)
    denoise = Denoiser(load_any(zoo["large"]).network, PROCESS)
    # what the chain hands on is put on 256 levels, so rounding may move single values by one level
    want = upsample(denoise, RespacedAncestral(3), small, (3, 32, 32), range(3), labels, batch_size=None)
    assert (images.images(0, 3) - want).abs().mean() < 2e-3
    assert images.image_size == 32
    resolved = images.plan()
    assert resolved.base is not None
    assert resolved.base.model == zoo["small"]
    assert resolved.base.guidance.scale == 6.0
    assert resolved.base.weights_sha256 != resolved.weights_sha256
    again = ModelImages(SamplePlan.from_dict(resolved.to_dict()))
    assert torch.equal(again.images(0, 2), images.images(0, 2))
    assert again.plan() == resolved


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("large", {"base": None}, "enlarges images and the plan does not say whose"),
        ("small", {"base": {"model": "x"}}, "samples without a smaller image: leave the base out"),
        ("small", {"guidance": {"classifier": "C", "scal": 1}}, "did you mean 'scale'"),
        ("small", {"guidance": {"classifier": "C"}}, "expected a number, but it is missing"),
        ("small", {"guidance": {"classifier": "small", "scale": 1.0}}, "is no classifier"),
    ],
)
def test_plans_that_do_not_fit(zoo: dict[str, str], model: str, change: dict, message: str) -> None:
    change = json.loads(json.dumps(change).replace('"C"', json.dumps(zoo["classifier"])))
    change = json.loads(
        json.dumps(change).replace('"small"', json.dumps(zoo["small"])).replace('"x"', json.dumps(zoo["small"]))
    )
    with pytest.raises(UserError, match=message):
        ModelImages(default_plan(zoo[model], load_any(zoo[model]).metadata, **change)).plan()


def test_eval_on_the_command_line(
    zoo: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path / "references"))
    fixed = ["--protocol", "demo", "--n", "4", "--few", "--metrics", "frechet:random-conv"]
    fixed += ["--device", "cpu", "--quiet"]
    plans = {}
    for name, arguments in {
        "preset": ["small", "--preset", "guided"],
        "flag": ["small", "--classifier", zoo["classifier"], "--guidance", "6", "--labels", "uniform"],
        "chain": ["large", "--preset", "guided", "--steps", "2"],
        "free": ["free", "--classifier", zoo["classifier"]],
    }.items():
        out = tmp_path / name
        assert main(["eval", zoo[arguments[0]], *arguments[1:], *fixed, "--out", str(out)]) == 0, (
            capsys.readouterr().err
        )
        plans[name] = Result.load(next(out.glob("demo_4*.json"))).plan
    assert plans["preset"] == plans["flag"]
    assert plans["chain"].base.guidance.classifier == zoo["classifier"]
    assert (plans["free"].labels, plans["free"].guidance.scale) == ("balanced", 1.0)
    assert main(["eval", zoo["small"], "--preset", "giuded", *fixed, "--out", str(tmp_path / "x")]) == 2
    assert "did you mean 'guided'" in capsys.readouterr().err


def test_a_sweep_varies_the_scale_of_the_classifier(zoo: dict[str, str]) -> None:
    base = default_plan(zoo["small"], load_any(zoo["small"]).metadata, "guided")
    assert Candidate(2.5).plan(base).guidance == ByClassifier(zoo["classifier"], 2.5)
    assert Candidate(1.0).plan(base).guidance == ByClassifier(zoo["classifier"], 1.0)
    assert Candidate(0.0).plan(base).guidance is None
    with pytest.raises(UserError, match="guides at all times"):
        Candidate(2.0, (0.2, 0.8)).plan(base)
