"""Two folders of images, references of other projects, and what a result says about files."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.stand_ins import protocol, smooth_images
from PIL import Image

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, Result, RunOptions, compare, evaluate, find_reference, make_reference
from diffzoo.evaluation.image_files import FolderImages
from diffzoo.evaluation.lossy import jpeg_quality, lossy_remark
from diffzoo.generation.guidance import ByWeakerModel
from diffzoo.images import to_uint8
from diffzoo.metrics import Moments, extract, frechet_distance, load_features
from diffzoo.metrics.features import RandomConv
from diffzoo.sampling import Heun

METRICS = ("frechet:random-conv", "kid:random-conv", "recall:random-conv")


@pytest.fixture(autouse=True)
def _references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path / "references"))


def folder(path: Path, seeds: range, suffix: str = ".png", **options: object) -> Path:
    path.mkdir()
    for i, pixels in zip(seeds, to_uint8(smooth_images(seeds)), strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path / f"{i:04d}{suffix}", **options)
    return path


def test_one_folder_against_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = folder(tmp_path / "a", range(140)), folder(tmp_path / "b", range(1000, 1150))
    args = ["eval", "--images", str(a), "--reference", str(b), "--metrics", *METRICS, "--quiet", "--device", "cpu"]
    assert main([*args, "--out", str(tmp_path / "one")]) == 0
    result = Result.load(tmp_path / "one" / "folders_140.json")
    assert result.protocol.reference.startswith("b-")
    assert f"the 150 images of 16 px in {b}" in result.remarks[0]
    network = load_features("random-conv")
    sides = [extract(network, to_uint8(smooth_images(seeds)))["pool"] for seeds in (range(140), range(1000, 1150))]
    want = frechet_distance(*(Moments.of(side) for side in sides))
    assert result.values["frechet:random-conv"].value == pytest.approx(want, rel=1e-9)
    # statistics are kept by content: a second run reads them, a changed image makes new ones
    monkeypatch.setattr("diffzoo.evaluation.reference.make_reference", lambda *a, **k: pytest.fail("made again"))
    assert main([*args, "--out", str(tmp_path / "two")]) == 0
    assert Result.load(tmp_path / "two" / "folders_140.json").same_numbers() == result.same_numbers()
    monkeypatch.undo()
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path / "references"))
    Image.new("RGB", (16, 16)).save(b / "1000.png")
    assert main([*args, "--out", str(tmp_path / "three")]) == 0
    changed = Result.load(tmp_path / "three" / "folders_140.json")
    assert changed.protocol.reference_sha256 != result.protocol.reference_sha256
    Image.new("RGB", (24, 24)).save(a / "0000.png")
    assert main([*args, "--out", str(tmp_path / "four")]) == 2


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    source = FolderImages(str(folder(tmp_path / "a", range(24))))
    reference = FolderImages(str(folder(tmp_path / "b", range(50, 62))))
    result = evaluate(source, protocol(12, metrics=("kid:random-conv",)), reference, RunOptions(out=tmp_path / "out"))
    assert any("first 12 of 24 images" in r and "12 were left out" in r for r in result.remarks)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: results need a folder"):
        evaluate(source, protocol(12), reference, RunOptions(out=tmp_path / "file"))


def test_frechet_ratios_are_relative_to_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffzoo.metrics import features

    monkeypatch.setitem(features.FEATURE_NETWORKS, "other-conv", lambda _: Other(seed=1))
    parts = {"train": range(150), "held_out": range(150, 300)}
    train, held_out = (FolderImages(str(folder(tmp_path / name, seeds))) for name, seeds in parts.items())
    names = ("random-conv", "other-conv")
    p = protocol(140, metrics=(*(f"frechet-ratio:{n}" for n in names), "frechet:random-conv"))
    with pytest.raises(UserError, match="give them with --held-out"):
        evaluate(held_out, p, train, RunOptions(out=tmp_path / "no"))
    source = FolderImages(str(folder(tmp_path / "g", range(500, 640))))
    result = evaluate(source, p, train, RunOptions(out=tmp_path / "out"), held_out)
    values = {name: value.value for name, value in result.values.items()}
    assert values["fdr2"] == pytest.approx(sum(values[f"frechet-ratio:{n}"] for n in names) / 2)
    network = load_features("random-conv")
    real, held = (Moments.of(extract(network, to_uint8(smooth_images(seeds)))["pool"]) for seeds in parts.values())
    want = values["frechet:random-conv"] / frechet_distance(held, real)
    assert values["frechet-ratio:random-conv"] == pytest.approx(want, rel=1e-6)
    assert result.protocol.settings["held_out_distance"].keys() == set(names)
    # the resolved protocol holds the distances, so that it measures alike without the images
    again = evaluate(source, result.protocol, train, RunOptions(out=tmp_path / "again"))
    assert again.same_numbers() == result.same_numbers()


def test_fdr6_of_imagenet_is_the_mean_of_six_published_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the raw distances to the statistics of the authors' bundle, divided by what they print."""
    from diffzoo.evaluation import protocol as named
    from diffzoo.metrics import features

    published = [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]
    files = [
        "guided_diffusion", "convnext_in256_t224", "vit_large_patch14_dinov2_lvd142m_in256_t256",
        "vit_large_patch16_224_mae_in256_t224", "vit_so400m_patch16_siglip_256_v2_webli_in256_t224",
        "vit_large_patch14_clip_224_openai_in256_t256",
    ]  # fmt: skip
    p = replace(named("fdr-imagenet256"), n=140, image_size=16)
    networks = [Other(seed=i) for i in range(6)]
    for network, metric in zip(networks, p.metrics, strict=True):
        network.name = metric.partition(":")[2]
        monkeypatch.setitem(features.FEATURE_NETWORKS, network.name, lambda _, made=network: made)
    real = [Moments.of(extract(network, to_uint8(smooth_images(range(300, 460))))["pool"]) for network in networks]
    bundle = {
        f"{name}_stats.npz": {"mu": m.mean.numpy(), "sigma": m.covariance().numpy(), "avg_mu": np.zeros(3)}
        for name, m in zip(files, real, strict=True)
    }
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "paper_ref_stats.pkl").write_bytes(pickle.dumps({**bundle, "jit_in256_stats.npz": {}}))
    images = FolderImages(str(folder(tmp_path / "g", range(140))))
    found = evaluate(images, p, find_reference(p.reference), RunOptions(out=tmp_path / "out"))
    sampled = [Moments.of(extract(network, to_uint8(smooth_images(range(140))))["pool"]) for network in networks]
    want = [frechet_distance(a, b) / v for a, b, v in zip(sampled, real, published, strict=True)]
    assert [v.value for v in found.values.values()] == pytest.approx([*want, sum(want) / 6], rel=1e-6)
    assert [*found.values][-1] == "fdr6"


def test_a_result_names_the_reference_that_was_used(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", range(12))
    made = make_reference(
        [to_uint8(smooth_images(range(50, 62)))], [load_features("random-conv")], tmp_path / "mine.npz"
    )
    (tmp_path / "theirs.npz").write_bytes(made.path.read_bytes())
    args = ["eval", "--images", str(a), "--metrics", "kid:random-conv", "--quiet", "--device", "cpu", "--n", "12"]
    (tmp_path / "p.json").write_text(
        json.dumps({**protocol(12, metrics=("kid:random-conv",)).to_dict(), "reference_sha256": made.sha256})
    )
    results = []
    for name, measured in (("mine", "folders"), ("theirs", "folders"), ("mine", str(tmp_path / "p.json"))):
        out = tmp_path / f"{name}{len(results)}"
        given = ["--protocol", measured, "--reference", str(tmp_path / f"{name}.npz"), "--out", str(out)]
        assert main([*args, *given]) == 0
        results.append(Result.load(next(out.glob("*.json"))))
    assert [r.protocol.reference for r in results] == ["mine", "theirs", "images"]  # a pinned one keeps its name
    assert "protocol folders" in compare(results[0], results[1])  # one content under two names


def test_copies_are_not_authentic_and_cost_variety(tmp_path: Path) -> None:
    train = FolderImages(str(folder(tmp_path / "train", range(60))))
    fresh = FolderImages(str(folder(tmp_path / "fresh", range(100, 140))))
    p = protocol(40, metrics=("authpct:random-conv", "vendi:random-conv"))
    copied = tmp_path / "copied"
    folder(copied, range(100, 120))
    for i in range(20):  # the other half are copies of one training image
        Image.open(train.files[7]).save(copied / f"copy{i}.png")
    whole, half = (
        evaluate(source, p, train, RunOptions(out=tmp_path / source.path[-5:], few=True)).values
        for source in (fresh, FolderImages(str(copied)))
    )
    assert half["authpct:random-conv"].value <= 50 < whole["authpct:random-conv"].value
    assert half["vendi:random-conv"].value < whole["vendi:random-conv"].value <= 40


class Other(RandomConv):
    """The same architecture with other weights, under a name of its own."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.name = "other-conv"


@pytest.mark.parametrize("quality", [25, 40, 50, 75, 90, 95])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(tmp_path: Path, quality: int) -> None:
    path = folder(tmp_path / "a", range(1), ".jpg", quality=quality) / "0000.jpg"
    assert abs(jpeg_quality(path) - quality) <= 1


@pytest.mark.parametrize(
    ("suffix", "options", "said"),
    [
        (".jpg", {"quality": 75}, r"JPEG of quality 75 \(100 %\)"),
        (".webp", {"quality": 80}, r"WebP \(100 %\)"),
        (".webp", {"lossless": True}, None),
        (".png", {}, None),
    ],
)
def test_files_saved_with_loss_are_remarked(tmp_path: Path, suffix: str, options: dict, said: str | None) -> None:
    found = lossy_remark(FolderImages(str(folder(tmp_path / "a", range(3), suffix, **options))).files, "the images")
    assert (found is None) if said is None else re.search(said, str(found))


def test_references_of_edm2_and_stylegan(tmp_path: Path) -> None:
    class Inception(torch.nn.Module):
        name, dims = "inception-2015", {"pool": 4}

    x = np.random.default_rng(0).normal(size=(50, 4))
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    files = {
        "edm2": {"fid": {"mu": mean, "sigma": covariance}},
        "stylegan": {"num_items": 50, "raw_mean": x.sum(0), "raw_cov": x.T @ x, "capture_all": False},
    }
    for name, data in files.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(data))
        reference = Reference.open(tmp_path / f"{name}.pkl")
        got = reference.statistics(Inception(), "pool")
        np.testing.assert_allclose(got[0], mean, atol=1e-12)
        np.testing.assert_allclose(got[1], covariance, atol=1e-12)
        assert reference.id == name


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("data", [{"fid": Evil()}, {"other": 3}, [1, 2]])
def test_other_pickles_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: object) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match=r"no pickle of statistics .* np\.savez"):
        Reference.open(tmp_path / "x.pkl")
    assert not (tmp_path / "touched").exists()


def test_results_of_earlier_versions_load_and_compare(tmp_path: Path) -> None:
    """A plan once said `average`; its hash is of what was written."""
    source = FolderImages(str(folder(tmp_path / "a", range(12))))
    evaluate(source, protocol(12, metrics=("kid:random-conv",)), source, RunOptions(out=tmp_path / "out"))
    new = Result.load(tmp_path / "out" / "test_12.json")
    from diffzoo.generation.plan import SamplePlan, digest

    plan = SamplePlan("x", sampler=Heun(steps=7), guidance=ByWeakerModel(2.0, weak="y", weak_weights="raw"))
    guidance = {"scale": 2.0, "weak": "y", "weak_average": "raw"}
    old = {**plan.to_dict(), "average": "average", "guidance": guidance, "sampler": {"class": "Heun"}, "steps": 7}
    old.pop("weights")
    data = {**new.to_dict(), "plan": old, "plan_sha256": digest(old)}
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert Result.load(tmp_path / "old.json").plan == plan
    assert replace(new, plan=Result.load(tmp_path / "old.json").plan).protocol.sha256 == new.protocol.sha256
