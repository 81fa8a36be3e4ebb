"""Plans, protocols, presets and comparison."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from evaluation.stand_ins import StandInImages, protocol, reference

from diffzoo.errors import UserError
from diffzoo.evaluation import PROTOCOLS, EvalProtocol, NetworkSpec, Reference, Result, SamplePlan, compare
from diffzoo.evaluation import protocol as named
from diffzoo.evaluation.checks import check
from diffzoo.evaluation.measure import ALIASES, Value, jackknife, metric_of
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.generation.guidance import ByClassifier, ByWeakerModel
from diffzoo.generation.plan import Base, labels_of
from diffzoo.metrics import load_features
from diffzoo.record import canonical_json, differences
from diffzoo.rng import EARLIER_NOISE, NOISE
from diffzoo.sampling import DDIM, Guidance, Heun, Interval, Karras

PLANS = [
    SamplePlan("tiny"),
    SamplePlan("tiny", guidance={"scale": 2.0, "interval": {"low": 0.1, "high": 0.9}}, classes=(3, 1)),
    SamplePlan("tiny", sampler=Heun(steps=3, grid=Karras(rho=5.0)), labels="uniform"),
    SamplePlan("tiny", guidance=ByWeakerModel(2.0, weak="weak"), base=Base("small", "guided")),
    SamplePlan(
        "tiny", guidance=ByClassifier("classifier", 4.0), base=SamplePlan("small", guidance=Guidance((1.0, 2.0)))
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_survives_json(plan: SamplePlan) -> None:
    again = SamplePlan.from_dict(json.loads(canonical_json(plan)))
    assert again == plan
    assert again.sha256 == plan.sha256


def test_a_plan_names_the_noise_that_made_its_images() -> None:
    made = {"model": "simple_uvit_xs_32.emoji", "weights_sha256": "0" * 64}
    assert SamplePlan.from_dict({"model": "tiny"}).noise == NOISE  # written by hand: nothing was made of it yet
    assert SamplePlan.from_dict({**made, "noise": NOISE}).noise == NOISE
    earlier = SamplePlan.from_dict({**made, "base": made})
    assert isinstance(earlier.base, SamplePlan)
    assert (earlier.noise, earlier.base.noise) == (EARLIER_NOISE, EARLIER_NOISE)
    with pytest.raises(UserError, match=f"plan.noise: expected '{NOISE}', got '{EARLIER_NOISE}'"):
        ModelImages(earlier).plan()


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_survives_json_and_its_metrics_exist(name: str) -> None:
    p = named(name)
    assert EvalProtocol.from_dict(json.loads(canonical_json(p))) == p
    for metric in p.metrics:
        metric_of(metric)


def test_every_field_is_in_the_hash() -> None:
    p = protocol()
    changed = {
        "name": "other", "reference": "x", "n": 7, "metrics": ("fid",), "networks": (NetworkSpec("random-conv"),),
        "reference_sha256": "0", "image_size": 3, "resize": "bicubic-antialias", "rounding": "truncate", "settings": {},
    }  # fmt: skip
    assert changed.keys() == p.to_dict().keys()
    assert len({p.sha256, *(replace(p, **{k: v}).sha256 for k, v in changed.items())}) == len(changed) + 1


def test_the_adm_protocols_are_the_published_protocol() -> None:
    p = named("adm-imagenet256")
    assert (p.n, p.image_size, p.rounding, p.resize) == (50_000, 256, "truncate", "none")
    assert p.metrics == ("fid", "sfid", "is", "precision", "recall")
    assert p.settings == {"is_split": 5000, "precision_recall_k": 3}


def test_all_named_protocols() -> None:
    adm = {f"adm-imagenet{size}" for size in (64, 128, 256, 512)}
    assert {
        "demo",
        "edm2-fdd",
        "fdr",
        "fdr-imagenet256",
        "folders",
        "coco30k-val2014",
        "cifar10",
        "celeba64",
        *adm,
    } == set(PROTOCOLS)
    with pytest.raises(UserError, match="did you mean 'adm-imagenet256'"):
        named("adm-imagnet256")


def test_unknown_fields_metrics_and_networks_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'fid'"):
        metric_of("fidd")
    with pytest.raises(UserError, match="did you mean 'random-conv'"):
        metric_of("frechet:random-con")
    assert metric_of(ALIASES["sfid"]) == metric_of("sfid")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "half"}, r"expected plan\.precision to be one of .*'tf32', 'bf16', .* got 'half'"),
        ({"labels": "random"}, r"expected plan\.labels to be one of 'none', .* got 'random'"),
        ({"first_seed": -1}, "at least 0, got -1"),
        ({"images_per_batch": 0}, "at least 1, got 0"),
    ],
)
def test_plans_reject_nonsense(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplePlan("x", **values)


def test_the_parts_of_a_plan_are_objects() -> None:
    assert SamplePlan("x").sampler == DDIM(steps=50, clip=1.0)
    data = {"scale": 2.0, "formula": "cond", "interval": {"low": 0.2, "high": 0.4}}
    assert SamplePlan("x", guidance=data).guidance == Guidance(2.0, "cond", Interval(0.2, 0.4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sampler": {"class": "DDMI"}}, "did you mean 'DDIM'"),
        ({"sampler": {"class": "Karras"}}, r"plan\.sampler: expected a Sampler, got 'Karras'"),
        ({"guidance": {"scal": 2.0}}, r"plan\.guidance: expected fields of Guidance, got 'scal'"),
        ({"guidance": {"scale": float("nan")}}, "a finite scale, got nan"),
        ({"guidance": {"classifier": "c"}}, r"plan\.guidance\.scale: expected a number, but it is missing"),
        ({"guidance": {"weak": "w"}}, r"plan\.guidance\.scale: .* missing"),
        ({"base": {"model": "m", "presett": "p"}}, r"plan\.base: expected fields of SamplePlan, got 'presett'"),
        ({"guidence": None}, "did you mean 'guidance'"),
        ({"classes": "0"}, r"plan\.classes: expected a list or null, got '0'"),
    ],
)
def test_wrong_plans_say_where(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplePlan.from_dict({"model": "x", **data})


# -- labels


@pytest.mark.parametrize("rule", ["balanced", "uniform"])
def test_a_label_depends_on_its_seed_alone(rule: str) -> None:
    plan = SamplePlan("x", labels=rule, first_seed=5)
    whole = labels_of(plan, 10, 0, 50)
    parts = [labels_of(plan, 10, a, 10) for a in range(0, 50, 10)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[7:], labels_of(replace(plan, first_seed=12), 10, 0, 43))


def test_label_rules() -> None:
    balanced = labels_of(SamplePlan("x", classes=(4, 2)), 10, 0, 6)
    assert balanced.tolist() == [4, 2, 4, 2, 4, 2]
    uniform = labels_of(SamplePlan("x", labels="uniform"), 10, 0, 2000)
    counts = torch.bincount(uniform, minlength=10)
    assert 140 < int(counts.min()) < int(counts.max()) < 260
    assert len(set(counts.tolist())) > 1
    assert labels_of(SamplePlan("x"), 0, 0, 3) is None


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ({"classes": (3, 10)}, 10, "do not fit the model: 10; the model has classes 0 to 9"),
        ({"classes": (-1,)}, 10, "do not fit the model: -1"),
        ({"classes": ()}, 10, "the list is empty"),
        ({"classes": (0,)}, 0, "the model is unconditional"),
        ({"labels": "none"}, 10, "without labels but the model has 10 classes"),
        ({"labels": "none", "classes": (1,)}, 10, "leave the classes out"),
    ],
)
def test_a_class_list_that_does_not_fit_the_model(values: dict, classes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels_of(SamplePlan("x", **values), classes, 0, 1)


# -- comparison


def result(p: EvalProtocol, value: float = 3.0, error: float | None = 0.1, **plan: object) -> Result:
    return Result(SamplePlan("x", **plan), p, {"frechet:random-conv": Value(value, error, "made up")})


def test_results_of_one_protocol_are_compared() -> None:
    text = compare(result(protocol()), result(protocol(), 3.5, sampler=DDIM(20, clip=1.0)))
    assert "+0.5 ± 0.141" in text
    assert "plans differ in sampler.steps: 50 and 20" in text


def test_results_of_two_protocols_are_refused_and_the_fields_named() -> None:
    other = protocol(n=200, settings={"kid_subsets": 9, "kid_subset_size": 50})
    with pytest.raises(UserError, match="cannot be compared") as caught:
        compare(result(protocol()), result(other), ("A", "B"))
    assert "n: 150 and 200" in str(caught.value)
    assert "settings.kid_subsets: 5 and 9" in str(caught.value)
    assert "kid_subset_size" not in str(caught.value)


def test_differences_reach_into_lists() -> None:
    a, b = {"n": [{"x": 1}, {"y": 2}]}, {"n": [{"x": 1}, {"y": 3}]}
    assert differences(a, b) == {"n[1].y": (2, 3)}
    assert differences(a, a) == {}


def test_a_notebook_shows_the_values_with_their_errors_and_remarks() -> None:
    shown = replace(result(protocol()), remarks=["n < 50 & few"])._repr_html_()
    page = ElementTree.fromstring(f"<div>{shown}</div>")
    assert [cell.text for cell in page.iter("td")] == ["3 ± 0.1"]
    assert [cell.text for cell in page.iter("th")] == ["frechet:random-conv"]
    assert page.findtext("p") == "n < 50 & few"


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("nonsense")
    for name in ("a", "b"):
        with pytest.raises(UserError, match="no result of `diffzoo eval`"):
            Result.load(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="could not read"):
        Result.load(tmp_path / "c.json")


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(12, dtype=torch.float64)
    left_out = [float((x.sum() - v) / 11) for v in x]
    assert jackknife(left_out) == pytest.approx(float(x.std() / 12**0.5), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frechet:random-conv", "kid:random-conv", "precision:random-conv"])
def test_the_standard_error_is_the_spread_over_seeds(tmp_path: Path, name: str) -> None:
    from diffzoo.evaluation.measure import Features, measure
    from diffzoo.metrics import extract

    ref, network = reference(tmp_path), load_features("random-conv")
    p = protocol(300, metrics=(name,), settings={"kid_subsets": 20, "kid_subset_size": 100})
    values = []
    for run in range(24):
        images = StandInImages().images(1000 * run, 300)
        layers = extract(network, ((images + 1) * 127.5).round().to(torch.uint8))
        features = Features({("random-conv", k): v for k, v in layers.items()})
        values.append(measure(p, features, ref, {"random-conv": network})[name])
    spread = torch.tensor([v.value for v in values]).std()
    claimed = torch.tensor([v.standard_error for v in values]).mean()
    assert 0.6 < float(claimed / spread) < 1.7


def test_cmmd_has_an_error_too(tmp_path: Path) -> None:
    from diffzoo.evaluation.measure import Features, measure

    class Clip(torch.nn.Module):
        name, dims = "clip-vitl14-336", {"image": 8}

    class Embedded:
        def features(self, network: object, layer: str) -> torch.Tensor:
            return torch.randn(300, 8, generator=torch.Generator().manual_seed(0))

    values = []
    for run in range(30):
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1 + run)) + 0.3
        features = Features({("clip-vitl14-336", "image"): x})
        p = protocol(200, metrics=("cmmd",))
        values.append(measure(p, features, Embedded(), {"clip-vitl14-336": Clip()})["cmmd"])
    spread = torch.tensor([v.value for v in values]).std()
    claimed = torch.tensor([v.standard_error for v in values]).mean()
    assert 0.6 < float(claimed / spread) < 1.7


# -- pinned hashes


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"))


def test_a_resolved_protocol_holds_all_hashes_and_keeps_to_them(ref: Reference) -> None:
    networks = {"random-conv": load_features("random-conv")}
    resolved, _ = check(StandInImages(), protocol(), ref, networks)
    assert resolved.reference_sha256 == ref.sha256
    assert resolved.networks[0].weights_sha256 == networks["random-conv"].weights_sha256()
    assert check(StandInImages(), resolved, ref, networks)[0] == resolved
    with pytest.raises(UserError, match="reference mismatch"):
        check(StandInImages(), replace(protocol(), reference_sha256="0" * 64), ref, networks)
    with pytest.raises(UserError, match="weights_sha256 000"):
        check(
            StandInImages(),
            replace(protocol(), networks=(NetworkSpec("random-conv", weights_sha256="0" * 64),)),
            ref,
            networks,
        )
