"""Stopping by a held-out distance, and the report on copies: on real runs of a small network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffzoo import load_any
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.evaluation import Reference, make_reference
from diffzoo.metrics import load_features
from diffzoo.training.held_out import HeldOutDistance

pytestmark = [
    pytest.mark.usefixtures("without_report"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen images, one colour each with some noise, a quarter of them held out."""
    for i in range(16):
        path = tmp_path / "images" / ("train" if i % 4 else "held") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = torch.tensor([16.0 * i, 255 - 16.0 * i, 128]) + 4 * torch.randn(16, 16, 3)
        Image.fromarray(colour.clamp(0, 255).byte().numpy()).save(path)
    return tmp_path / "images"


def fit(images: Path, steps: int, callbacks: str, *more: str) -> int:
    recipe = images.parent / "recipe.yaml"
    recipe.write_text(f"""
seed_everything: 0
model:
  network: simple_uvit_xs_32
  network_args: {{image_size: 16, width_at: {{8: 32, 4: 32}}, depth_at: {{4: 1}}}}
  sampler: {{class_path: DDIM, init_args: {{steps: 2, clip: 1.0}}}}
  optimizer: {{class_path: diffzoo.training.FusedAdamW, init_args: {{lr: 1.0e-3}}}}
data:
  class_path: ImageFolder
  init_args:
    {{path: {images / "train"}, val_path: {images / "held"}, image_size: 16, batch_size: 4, num_workers: 0}}
trainer:
  accelerator: cpu
  max_steps: {steps}
  limit_val_batches: 0
  callbacks:
    - {{class_path: EMA, init_args: {{decays: [0.5]}}}}
{callbacks}
""")
    return main(["fit", "-c", str(recipe), "--run", str(images.parent / "run"), *more])


HELD_OUT = """    - class_path: diffzoo.training.HeldOutDistance
      init_args: {metric: "frechet:random-conv", every_n_steps: 2, n: 8, patience: 2, min_delta: MIN_DELTA}"""


def test_training_stops_and_the_best_weights_are_kept(images: Path, capsys: pytest.CaptureFixture) -> None:
    # nothing is better by nine tenths than the first, so it stops after two more; `best` is that of the first
    assert fit(images, 40, HELD_OUT.replace("MIN_DELTA", "0.9")) == 0
    run = images.parent / "run"
    newest = torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert newest["global_step"] == 6
    assert "stopped at step 6: the held-out frechet:random-conv has been no better than" in capsys.readouterr().out
    best = load_any(run / "best")
    assert best.provenance.global_step == 2
    last = load_any(run).network.state_dict()
    assert any(not torch.equal(v, last[k]) for k, v in best.network.state_dict().items())
    values = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = values[0].index("eval/frechet:random-conv")
    assert len([row for row in values[1:] if len(row) > column and row[column]]) >= 3

    # the reference is that of the held-out images, and of nothing else
    made = Reference.open(run / "held_out.npz")
    files = sorted((images / "held").glob("*.png"), key=lambda p: int(p.stem))
    pixels = torch.stack([torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8).view(16, 16, 3)
                          for f in files]).permute(0, 3, 1, 2)  # fmt: skip
    net = load_features("random-conv")
    expected = make_reference([pixels], [net], images.parent / "expected.npz").statistics(net, "pool")
    torch.testing.assert_close(made.statistics(net, "pool")[0], expected[0])


def test_what_is_remembered_survives_a_resume(images: Path) -> None:
    callbacks = HELD_OUT.replace("MIN_DELTA", "0.9")
    assert fit(images, 4, callbacks) == 0  # the best at 2, one measurement since
    assert fit(images, 40, callbacks, "--resume", "auto") == 0
    newest = max((images.parent / "run" / "checkpoints").glob("*.ckpt"))
    assert newest.name == "step_00000006.ckpt"


def test_patience_counts_measurements_since_the_best(tmp_path: Path) -> None:
    callback = HeldOutDistance("frechet:random-conv", every_n_steps=1, patience=2, min_delta=0.1)
    written: list[int] = []
    trainer = SimpleNamespace(global_step=0, should_stop=False, default_root_dir=tmp_path)
    module = SimpleNamespace(write_weights=lambda folder: written.append(trainer.global_step))
    for step, value in enumerate([10.0, 9.5, 8.0, 7.5, 7.3], 1):  # 9.5 and 7.5 are no better by a tenth
        trainer.global_step = step
        assert not trainer.should_stop
        callback.judge(trainer, module, value)
    assert trainer.should_stop
    assert written == [1, 3]
    assert (callback.best, callback.best_step) == (8.0, 3)


def test_data_without_held_out_images_says_what_to_set(images: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("--data.init_args.val_path=null", "--data.init_args.val_fraction=0")
    assert fit(images, 2, HELD_OUT.replace("MIN_DELTA", "0"), *options) == 2
    assert "holds no images out: set val_path or val_fraction" in capsys.readouterr().err


def test_only_frechet_distances_stop() -> None:
    with pytest.raises(UserError, match="which is is not"):
        HeldOutDistance("is")


REPORT = """    - class_path: diffzoo.training.MemorisationReport
      init_args: {network: random-conv, n: 6, pairs: 3}"""


def test_the_report_names_nearest_training_images(images: Path) -> None:
    assert fit(images, 2, REPORT) == 0
    run = images.parent / "run"
    found = json.loads((run / "memorisation.json").read_text())
    assert sorted(found["sample"]) == list(range(6))
    assert max(found["training"]) < 12
    assert found["distance"] == sorted(found["distance"])
    assert Image.open(run / "memorisation.png").size[1] >= 3 * 16


def test_a_copy_is_found(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffzoo.data import ImageFolder
    from diffzoo.training import held_out

    data = ImageFolder(str(images / "train"), image_size=16, num_workers=0)
    copy = held_out._training_images(data)[5:6]
    samples = torch.cat([torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), copy])
    monkeypatch.setattr(held_out.MemorisationReport, "sample", lambda *args: samples)
    assert fit(images, 1, REPORT) == 0
    found = json.loads((images.parent / "run" / "memorisation.json").read_text())
    assert (found["sample"][0], found["training"][0], round(found["distance"][0], 3)) == (5, 5, 0)


def test_nothing_is_measured_before_the_first_step(images: Path) -> None:
    """While gradients are accumulated for the first step its number is 0, a multiple of everything."""
    grid = "    - {class_path: SampleGrid, init_args: {every_n_steps: 2, per_class: 1}}\n"
    more = ("--data.init_args.micro_batch_size=1", "--trainer.val_check_interval=1.0")
    assert fit(images, 2, grid + HELD_OUT.replace("MIN_DELTA", "0"), *more) == 0
    run = images.parent / "run"
    assert sorted(p.name for p in (run / "samples").glob("*.png")) == ["final.png", "step_0000002.png"]
    assert load_any(run / "best").provenance.global_step == 2
    assert fit(images, 3, grid, *more, "--resume", "auto") == 0
    assert sorted(p.name for p in (run / "samples").glob("*.png")) == ["final.png", "step_0000002.png"]
