"""`ImageMetrics`: the values of `diffzoo eval`, on the EMA weights."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from evaluation.stand_ins import protocol, reference
from torch import nn
from torch.utils.data import DataLoader

from diffzoo.encoders import Identity
from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, RunOptions, SamplePlan, evaluate
from diffzoo.generation import Generator, PlannedImages
from diffzoo.models.base import Config, Network
from diffzoo.process import GaussianProcess
from diffzoo.sampling import DDIM
from diffzoo.training.ema import EMA, averaged
from diffzoo.training.image_metrics import ImageMetrics
from diffzoo.training.module import DiffusionModule


class Tiny(Network):
    """A convolution and a class bias."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.label = nn.Embedding(config.class_rows, 3)

    def forward(self, z, noise_level, cond=None):
        return self.conv(z) + self.label(self.labels(z, cond))[:, :, None, None]


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict:
        return {"image": torch.full((3, 16, 16), 8 * i, dtype=torch.uint8), "label": i % 5, "index": i, "id": i}


class Logged(L.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if "eval/frechet:random-conv" in trainer.callback_metrics:
            self.seen[trainer.global_step] = float(trainer.callback_metrics["eval/frechet:random-conv"])


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("reference"))


def of_training(module: DiffusionModule, plan: SamplePlan) -> PlannedImages:
    """The module's images as a source for `evaluate`."""
    return PlannedImages(Generator(module.network, module.process, Identity()), plan)


def test_values_are_those_of_eval_on_the_averaged_weights(tmp_path: Path, ref: Reference) -> None:
    torch.manual_seed(0)
    module = DiffusionModule(
        Tiny(Config(image_size=16, num_classes=5)), process=GaussianProcess(), sampler=DDIM(steps=2),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    callback = ImageMetrics(
        str(ref.path), ["frechet:random-conv", "inception-score:random-conv"], every_n_steps=2, n=140, batch_size=35
    )
    logged = Logged()
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[EMA(decays=[0.5]), callback, logged],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(), batch_size=4), DataLoader(Rows(), batch_size=4))
    assert set(logged.seen) == {2, 3, 4}
    plan = SamplePlan("in training", sampler=DDIM(2), labels="balanced", images_per_batch=35)
    p = protocol(140, metrics=("frechet:random-conv", "inception-score:random-conv"))
    with averaged(module):
        want = evaluate(of_training(module, plan), p, ref, RunOptions(out=tmp_path / "average", block_size=35))
    raw = evaluate(of_training(module, plan), p, ref, RunOptions(out=tmp_path / "raw", block_size=35))
    value = want.values["frechet:random-conv"].value
    assert logged.seen[4] == pytest.approx(value, rel=1e-5)
    assert abs(raw.values["frechet:random-conv"].value - value) > 1e-3 * value
    assert float(trainer.callback_metrics["eval/inception-score:random-conv"]) == pytest.approx(
        want.values["inception-score:random-conv"].value, rel=1e-5
    )


def test_every_image_is_sampled_by_one_rank_and_all_take_equally_many_turns(ref: Reference) -> None:
    module = DiffusionModule(Tiny(Config(image_size=16, num_classes=5)), process=GaussianProcess(), sampler=DDIM(2))
    callback = ImageMetrics(str(ref.path), ["frechet:random-conv"], n=50, batch_size=8)
    calls: list[int] = []
    original = PlannedImages.images

    class Rank:
        world_size = 3

        def __init__(self, rank: int):
            self.global_rank = rank

    drawn, turns = [], []
    for rank in range(3):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlannedImages, "images", lambda self, a, n: (calls.append(a), original(self, a, n))[1])
            drawn += [len(p) for p in callback._images(Rank(rank), module)]
        turns.append(len(calls))
    assert sum(drawn) == 50
    assert turns == [3, 3, 3]  # seven batches for three ranks


@pytest.mark.slow
def test_two_processes_log_what_eval_measures_with_one(tmp_path: Path, ref: Reference) -> None:
    script = Path(__file__).with_name("run_distributed_metrics.py")
    paths = os.pathsep.join(str(p) for p in (script.parents[1], script.parents[2]))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(ref.path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert first["values"] == second["values"]
    assert first["logged"] == second["logged"]
    assert first["logged"][4] == pytest.approx(first["values"]["frechet:random-conv"], rel=1e-6)
    module = DiffusionModule(Tiny(Config(image_size=16, num_classes=5)), process=GaussianProcess(), sampler=DDIM(2))
    module.network.load_state_dict(first["state"])
    module.network.eval()
    plan = SamplePlan("in training", sampler=DDIM(2), labels="balanced", images_per_batch=20)
    p = protocol(140, metrics=tuple(first["values"]))
    want = evaluate(of_training(module, plan), p, ref, RunOptions(out=tmp_path, block_size=20)).values
    assert first["values"] == pytest.approx({name: v.value for name, v in want.items()}, rel=1e-5)


def test_metrics_that_do_not_add_are_refused(ref: Reference) -> None:
    with pytest.raises(UserError, match="precision:random-conv needs the features of all images at once"):
        ImageMetrics(str(ref.path), ["precision:random-conv"])
    with pytest.raises(UserError, match="n of at least 2"):
        ImageMetrics(str(ref.path), ["frechet:random-conv"], n=1)
