"""Samples of other heights and widths than those that a model was trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffzoo.encoders.autoencoder import Identity
from diffzoo.errors import UserError
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.generation import Generator, pipeline
from diffzoo.generation.plan import SamplePlan
from diffzoo.images import to_uint8
from diffzoo.models import adm, uvit_bao
from diffzoo.models.simple_uvit import TINY, SimpleUViT
from diffzoo.process import GaussianProcess, Shifted, TimeConditioning, V
from diffzoo.sampling import DDIM, Denoiser, sample
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.adapt import build_with
from diffzoo.zoo.loading import load_any, locate


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A network that reads log-SNR and has learned positions, on disk."""
    torch.manual_seed(0)
    network = SimpleUViT(TINY.override(num_classes=0, image_size=16))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_pretrained(network, tmp_path / "model", process=GaussianProcess(prediction=V()))
    return tmp_path / "model"


def test_a_size_at_sampling_is_the_network_built_for_it_under_the_schedule_of_its_pixels(model: Path) -> None:
    pipe = pipeline(model, "cpu")
    made = pipe(seeds=[3, 4], steps=3, size=(16, 32))
    network = build_with(locate(str(model)), {"image_size": (16, 32)}).eval()
    process = GaussianProcess(schedule=Shifted(pipe.process.schedule, 1, 2**0.5), prediction=V())  # twice the pixels
    assert process.schedule.shift == pytest.approx(-np.log(2))
    expected = to_uint8(sample(Denoiser(network, process), DDIM(steps=3), (3, 16, 32), [3, 4]))
    difference = np.abs(made.pixels.astype(int) - expected.permute(0, 2, 3, 1).numpy())
    assert made.pixels.shape == (2, 16, 32, 3)
    assert difference.max() <= 1


def test_its_own_size_changes_nothing(model: Path) -> None:
    pipe = pipeline(model, "cpu")
    assert pipe.generator.at((16, 16)) is pipe.generator.at(None) is pipe.generator
    assert np.array_equal(pipe(seeds=[1], steps=2, size=16).pixels, pipe(seeds=[1], steps=2).pixels)
    assert pipe.generator.at((8, 32)).process == pipe.process  # as many pixels


def test_a_plan_holds_the_size_and_plans_without_one_keep_their_hash(model: Path) -> None:
    plan = SamplePlan(str(model), sampler=DDIM(steps=2), labels="none", size=(32, 16))
    assert SamplePlan.from_dict(plan.to_dict()) == plan
    assert "size" not in SamplePlan(str(model)).to_dict()
    images = ModelImages(plan, "cpu", loaded=Generator.of(load_any(model), "cpu"))
    assert images.image_size == (32, 16)
    assert images.images(0, 2).shape == (2, 3, 32, 16)


def test_a_network_that_reads_time_keeps_its_schedule() -> None:
    process = GaussianProcess(noise_conditioning=TimeConditioning(999), prediction=V())
    network = uvit_bao.UViTBao(uvit_bao.TINY)
    assert Generator(network, process, Identity()).at((16, 32)).process is process


def test_sizes_that_a_model_cannot_have_are_refused_in_a_sentence(model: Path) -> None:
    generator = pipeline(model, "cpu").generator
    with pytest.raises(UserError, match="multiples of 2, got 33x16: the nearest is 32x16"):
        generator.at((33, 16))
    generator.classifier = adm.ADMClassifier(adm.TINY_CLASSIFIER)
    with pytest.raises(UserError, match="samples images of 16 px only, because its classifier reads one size"):
        generator.at((32, 16))
