"""Plans with scales per class, a weaker model, compilation: the images are those of the parts put together by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import perturbed

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.evaluation import Result, SamplePlan
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.precision import float32_digits
from diffzoo.process import GaussianProcess
from diffzoo.sampling import DDIM, Autoguidance, ClassifierFree, Denoiser, Guidance, Interval, sample
from diffzoo.typing import Condition
from diffzoo.zoo import save_pretrained

CLASSES = 4


def saved(folder: Path, seed: int, **changes: int) -> tuple[Path, Denoiser]:
    torch.manual_seed(seed)
    config = {"image_size": 8, "in_channels": 3, "num_classes": CLASSES, "patch": 4, "width": 32, "depth": 3}
    network = perturbed(UViTBao(UViTBaoConfig(**{**config, "heads": 2, **changes})), 0.05)
    path = folder / f"model{seed}"
    save_pretrained(network, path, process=GaussianProcess())
    return path, Denoiser(network.eval(), GaussianProcess())


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Denoiser]:
    return saved(tmp_path_factory.mktemp("strong"), 0)


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Denoiser]:
    return saved(tmp_path_factory.mktemp("weak"), 1)


def plan(path: Path, **changes: object) -> SamplePlan:
    return replace(SamplePlan(str(path), sampler=DDIM(steps=3, clip=1.0)), **changes)


def sampled(denoise: object, labels: bool = True) -> torch.Tensor:
    cond = Condition(label=torch.arange(6) % CLASSES) if labels else None
    return sample(denoise, DDIM(steps=3, clip=1.0), (3, 8, 8), range(6), cond)


def test_a_scale_per_class(strong: tuple[Path, Denoiser]) -> None:
    path, denoise = strong
    scales = [1.0, 2.0, 3.0, 0.5]
    source = ModelImages(plan(path, guidance={"scale": scales}))
    assert source.plan().guidance == Guidance(tuple(scales))
    want = sampled(ClassifierFree(denoise, torch.tensor(scales), per="class"))
    torch.testing.assert_close(source.images(0, 6), want, rtol=1e-4, atol=1e-5)
    assert (want - sampled(ClassifierFree(denoise, 2.0))).abs().amax(dim=(1, 2, 3))[[0, 2, 3]].min() > 1e-3
    with pytest.raises(UserError, match="3 guidance scales and the model 4 classes"):
        ModelImages(plan(path, guidance={"scale": [1.0, 2.0, 3.0]})).plan()


def test_a_weaker_model_guides(strong: tuple[Path, Denoiser], weak: tuple[Path, Denoiser]) -> None:
    guidance = {"scale": 2.0, "weak": str(weak[0]), "interval": {"low": 0.2, "high": 1.0}}
    source = ModelImages(plan(strong[0], guidance=guidance))
    resolved = source.plan()
    assert len(resolved.guidance.weak_sha256) == 64
    assert resolved.guidance.weak_sha256 != resolved.weights_sha256
    assert ModelImages(resolved).plan() == resolved
    want = sampled(Autoguidance(strong[1], weak[1], 2.0, interval=Interval(0.2, 1.0)))
    torch.testing.assert_close(source.images(0, 6), want, rtol=1e-4, atol=1e-5)
    assert (want - sampled(strong[1])).abs().max() > 1e-2


def test_weaker_models_that_do_not_fit(
    strong: tuple[Path, Denoiser], weak: tuple[Path, Denoiser], tmp_path: Path
) -> None:
    more = saved(tmp_path, 3, num_classes=CLASSES + 1)[0]
    with pytest.raises(UserError, match="autoguidance needs two of one kind"):
        ModelImages(plan(strong[0], guidance={"scale": 2.0, "weak": str(more)})).plan()
    pinned = {"scale": 2.0, "weak": str(weak[0]), "weak_sha256": "0" * 64}
    with pytest.raises(UserError, match="leave weak_sha256 out"):
        ModelImages(plan(strong[0], guidance=pinned)).plan()
    # a weaker model without classes does not see the labels
    other, blind = saved(tmp_path, 2, num_classes=0)
    source = ModelImages(plan(strong[0], guidance={"scale": 2.0, "weak": str(other)}))
    source.plan()
    cond = Condition(label=torch.arange(6) % CLASSES)
    z, t = torch.randn(6, 3, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        got, good, bad = Autoguidance(strong[1], blind, 2.0)(z, t, cond), strong[1](z, t, cond), blind(z, t)
    torch.testing.assert_close(got.x, bad.x + 2 * (good.x - bad.x))
    torch.testing.assert_close(source.images(0, 6), sampled(Autoguidance(strong[1], blind, 2.0)), rtol=1e-4, atol=1e-4)
    # away from itself is nowhere, and an unconditional model may be guided so
    source = ModelImages(plan(other, labels="none", guidance={"scale": 3.0, "weak": str(other)}))
    source.plan()
    torch.testing.assert_close(
        source.images(0, 6), sampled(saved(tmp_path, 2, num_classes=0)[1], labels=False), rtol=1e-4, atol=1e-4
    )
    # nothing else guides it, but a scale that means "none" does no harm
    assert ModelImages(plan(other, labels="none", guidance={"scale": 1.0})).plan().guidance is None
    with pytest.raises(UserError, match="the model is unconditional"):
        ModelImages(plan(other, labels="none", guidance={"scale": 2.0})).plan()
    with pytest.raises(UserError, match=r"guidance\.scale: expected a number"):
        ModelImages(plan(strong[0], guidance={"weak": str(weak[0])})).plan()


def test_autoguidance_on_the_command_line(
    strong: tuple[Path, Denoiser], weak: tuple[Path, Denoiser], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("DIFFZOO_REFERENCES", str(tmp_path / "references"))
    monkeypatch.chdir(tmp_path)
    fixed = ["eval", str(strong[0]), "--protocol", "demo", "--n", "130", "--metrics", "frechet:random-conv",
             "--steps", "1", "--quiet", "--device", "cpu", "--weak", str(weak[0])]  # fmt: skip
    assert main(fixed) == 2
    assert "--guidance says how much" in capsys.readouterr().err
    assert main([*fixed, "--guidance", "2"]) == 0
    # without --out: a folder with the model's name
    (file,) = (tmp_path / "eval").glob("*/demo_130.json")
    assert strong[0].name in file.parent.name
    assert Result.load(file).plan.guidance.weak == str(weak[0])


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has other switches")
@pytest.mark.parametrize(("precision", "digits"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")])
def test_fp32_means_all_digits(strong: tuple[Path, Denoiser], precision: str, digits: str) -> None:
    source = ModelImages(plan(strong[0], precision=precision))
    seen = set()
    source.generator.network.register_forward_hook(lambda *_: seen.add(torch.backends.cuda.matmul.fp32_precision))
    with float32_digits():
        torch.set_float32_matmul_precision("high")
        source.images(0, 2)
    assert seen == {digits}


@pytest.mark.slow
def test_compiled_images_are_those_of_the_plain_network(strong: tuple[Path, Denoiser]) -> None:
    source = ModelImages(plan(strong[0], compile=True, guidance={"scale": 2.0}))
    assert source.plan().sha256 != replace(source.plan(), compile=False).sha256
    torch.testing.assert_close(source.images(0, 6), sampled(ClassifierFree(strong[1], 2.0)), rtol=1e-3, atol=1e-3)
    assert any(u._compiled_call_impl is not None for u in source.generator.network.units())
