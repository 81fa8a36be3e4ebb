"""The fine-tuning recipe of ADM, run as its header says, on a small network and a folder of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data.stand_ins import write_images
from networks import perturbed

from diffzoo import load_any, pipeline
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models import registry
from diffzoo.models.adm import TINY, ADMUNet
from diffzoo.process import DiscreteBetas, Eps, GaussianProcess, TimeConditioning, V
from diffzoo.training.module import DiffusionModule
from diffzoo.zoo import save_pretrained

PROCESS = GaussianProcess(
    DiscreteBetas("cosine"), prediction=Eps(), noise_conditioning=TimeConditioning(1000.0, -1.0), learned_variance=True
)
# Lightning's own: few workers, deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", [f"{c}/{i}.png" for c in ("bee", "cow", "eel") for i in range(4)])


@pytest.fixture
def released(tmp_path: Path, own_registry: None) -> ADMUNet:
    """A small network with the weights in the folder `released`."""
    registry.register_model("adm_nano", ADMUNet, TINY)
    torch.manual_seed(0)
    network = perturbed(ADMUNet(TINY))
    save_pretrained(network, tmp_path / "released", process=PROCESS, name="adm_nano")
    return network


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prediction": V()}, "prediction"),
        ({"noise_conditioning": TimeConditioning(999.0)}, "noise_conditioning"),
        ({"learned_variance": False}, "learned_variance"),
    ],
)
def test_weights_that_mean_something_else_are_refused(
    released: ADMUNet, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError, match=f"the weights in .*released were trained with another {field}"):
        DiffusionModule("adm_nano", weights=str(tmp_path / "released"), process=replace(PROCESS, **changes))
    DiffusionModule("adm_nano", weights=str(tmp_path / "released"), process=PROCESS)


def test_another_schedule_is_a_choice_that_is_said_aloud(released: ADMUNet, tmp_path: Path) -> None:
    other = replace(PROCESS, schedule=DiscreteBetas("linear"))
    with pytest.warns(UserWarning, match="another schedule"):
        DiffusionModule("adm_nano", weights=str(tmp_path / "released"), process=other)


def test_the_recipe_starts_from_the_weights_with_a_class_table_of_its_own(
    images: Path, tmp_path: Path, released: ADMUNet
) -> None:
    options = {
        "model.network": "adm_nano", "model.weights": str(tmp_path / "released"), "model.network_args.classes": "mean",
        "model.network_args.num_classes": "3", "data.init_args.path": str(images), "data.init_args.image_size": "16",
        "data.init_args.batch_size": "4", "data.init_args.num_workers": "0",
        "model.lr_scheduler.init_args.warmup_steps": "2",
        "trainer.max_steps": "1", "trainer.precision": "32-true", "trainer.accelerator": "cpu",
        "trainer.callbacks": "[{class_path: EMA, init_args: {decays: [0.0]}}]",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "-c", "finetune/adm_64", "--run", str(tmp_path / "run"), *arguments]) == 0

    tuned = load_any(tmp_path / "run")
    assert tuned.process == PROCESS
    assert tuned.class_names == ("bee", "cow", "eel")
    before, after = released.state_dict(), tuned.network.state_dict()
    assert after["classes.weight"].shape[0] == 4  # and one for "none"
    table = before["classes.weight"].mean(0)
    # one step at a warmed-up rate of at most 3e-5 moves no weight by more than that
    assert (after["classes.weight"][:3] - table).abs().max() < 1e-4
    same = [k for k in before if k != "classes.weight"]
    assert all((after[k] - before[k]).abs().max() < 1e-4 for k in same)
    assert any(not torch.equal(after[k], before[k]) for k in same)
    samples = pipeline(tmp_path / "run", "cpu")(["cow"], seeds=[0], steps=2, guidance=1.5)
    assert samples.pixels.shape == (1, 16, 16, 3)
