"""`diffzoo fit` and `diffzoo quickstart` as a user runs them: files of a run, resume, own images, learning."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.stand_ins import write_images
from PIL import Image

from diffzoo.cli import quickstart
from diffzoo.cli.main import main
from diffzoo.data import ImageFolder
from diffzoo.data.demo import DemoData
from diffzoo.generation.plan import default_plan
from diffzoo.images import LINE
from diffzoo.recipe.files import find_recipe, recipe_name
from diffzoo.sampling import Guidance
from diffzoo.zoo import load_any
from diffzoo.zoo.publish import _fill

pytestmark = [
    # Lightning's own: few workers, deprecated parts of torch
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
]

RECIPE = """
model:
  network: simple_uvit_xs_32
  network_args: {num_classes: 10, width_at: {16: 16, 8: 32}, depth_at: {8: 1}}
  sampler: {class_path: DDIM, init_args: {steps: 2, clip: 1.0}}
  guidance: {formula: uncond + s * (cond - uncond), scale: 2.5}
  optimizer: {class_path: diffzoo.training.FusedAdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: DemoData
  init_args: {image_size: 32, batch_size: 8, num_workers: 0}
trainer:
  max_steps: 6
  limit_val_batches: 1
  val_check_interval: 3
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  accelerator: cpu
  callbacks:
    - {class_path: EMA, init_args: {decays: [0.9]}}
    - {class_path: SampleGrid, init_args: {every_n_steps: 3, per_class: 2}}
    - {class_path: Checkpointing, init_args: {every_n_steps: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(autouse=True)
def _one_report(request: pytest.FixtureRequest) -> None:
    if request.function is not test_a_run_leaves_what_it_promises:
        request.getfixturevalue("without_report")


def newest(run: Path) -> dict:
    return torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", recipe, "--run", str(run)]) == 0
    promised = {"config.yaml", "metrics.csv", "report.html", "tensorboard", "samples", "checkpoints"}
    assert promised <= {p.name for p in run.iterdir()}
    assert {p.name for p in (run / "samples").iterdir()} == {"step_0000003.png", "step_0000006.png", "final.png"}
    # two of each of eight classes
    assert Image.open(run / "samples" / "final.png").size == (2 * 130 + 2, 8 * (130 + 2 * LINE) + 2)
    # the command that it names makes it again
    with Image.open(run / "samples" / "final.png") as final:
        made = json.loads(final.info["diffzoo"])
        again = ["--out", str(tmp_path / "again.png"), "--device", "cpu", "--quiet"]
        assert (made["step"], main(["sample", str(run), *made["options"], *again])) == (6, 0)
        with Image.open(tmp_path / "again.png") as sampled:
            assert np.abs(np.asarray(sampled).astype(int) - np.asarray(final)).max() <= 1
    _fill(tmp_path, run, "someone/x", "mit", "ema", None, (), merge=False)
    card = (tmp_path / "README.md").read_text()
    assert f"diffzoo sample hf-hub:someone/x {' '.join(made['options'])}\n" in card
    assert "Weights: ema_0.9, at step 6." in card
    rows = metrics(run)
    assert [int(r["step"]) for r in rows if r["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [int(r["step"]) for r in rows if r["val/loss"]] == [3, 6]
    assert all(0 < float(r["val/loss"] or r["train/loss"]) < 3 for r in rows)
    plan = default_plan("run", load_any(run).metadata)  # what `diffzoo eval RUN` draws with
    assert (plan.sampler.steps, plan.guidance) == (2, Guidance(2.5))
    assert load_any(run).metadata.recipe == recipe_name(Path(recipe))
    # the configuration that was saved is itself a recipe, and gives the same run
    again = tmp_path / "again"
    assert main(["fit", "-c", str(run / "config.yaml"), "--run", str(again)]) == 0
    assert all(torch.equal(v, newest(again)["state_dict"][k]) for k, v in newest(run)["state_dict"].items())


@pytest.mark.parametrize("micro", [4, 2])
def test_resumed_in_micro_batches_is_as_never_stopped(recipe: str, tmp_path: Path, micro: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["fit", "-c", recipe, f"--data.init_args.micro_batch_size={micro}"]
    assert main([*common, "--run", str(whole)]) == 0
    assert main([*common, "--run", str(parts), "--trainer.max_steps=4"]) == 0
    assert main([*common, "--run", str(parts), "--resume", "auto"]) == 0
    a, b = newest(whole), newest(parts)
    assert a["global_step"] == b["global_step"] == 6
    assert a["DemoData"]["images_seen"] == b["DemoData"]["images_seen"] == 6 * 8
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    assert [r["train/loss"] for r in metrics(parts)] == [r["train/loss"] for r in metrics(whole)]


def test_micro_batches_train_as_the_whole_batch_does(recipe: str, tmp_path: Path) -> None:
    for name, options in {"whole": [], "micro": ["--data.init_args.micro_batch_size=2"]}.items():
        assert main(["fit", "-c", recipe, "--run", str(tmp_path / name), *options, "--model.condition_dropout=0"]) == 0
    a, b = (newest(tmp_path / name)["state_dict"] for name in ("whole", "micro"))
    assert a.keys() == b.keys()
    # Adam divides by the root of tiny second moments: float rounding is amplified, but stays far below a step of 1e-3
    assert max(float((v - b[k]).abs().max()) for k, v in a.items()) < 2e-4


def test_a_folder_of_images(recipe: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [f"{c}/{i}.png" for c in ("blue", "red") for i in range(6)], (40, 55))
    run = tmp_path / "run"
    command = ["fit", "-c", recipe, "--run", str(run), "--data.folder", str(images), "--trainer.max_steps=1"]
    assert main([*command, "--data.init_args.batch_size=4", "--model.network_args.num_classes=2"]) == 0
    assert newest(run)["diffzoo"]["class_names"] == ["blue", "red"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.network_args.num_classes=7"], "the data has 10 classes but simple_uvit_xs_32 has 7"),
        (["--model.network_args.image_size=33"], "33"),
        (["--model.network_args.drpout=0.1"], "drpout.*did you mean 'dropout'"),
        (["--model.network=simple_uvit_xs_23"], "did you mean 'simple_uvit_xs_32'"),
        (["--data.folder", "no/such/folder"], "no/such/folder"),
        (["--data.init_args.batch_size=0"], "batch_size is a positive whole number, got 0"),
        (["--data.init_args.micro_batch_size=3"], "set micro_batch_size to 2 or 4"),
        (["--data.init_args.batch_size=many"], r"data\.batch_size: expected a whole number, got many$"),
        (
            ["--data=ImageFolder", "--data.init_args.source=x"],
            "ImageFolder has no argument 'source'.* path, .* caption$",
        ),
        (["--data=pictures"], "no class 'pictures'; known: Cifar10, .* --data.folder pictures trains on a folder"),
        (["--model.optimizer.init_args.learning_rate=1"], "FusedAdamW has no argument 'learning_rate'.* lr, "),
        (["--trainer.precision=bf16-mixd"], "got bf16-mixd; did you mean 'bf16-mixed'"),
        (
            ["--data.init_args.val_fraction=null"],
            "data.init_args.val_fraction cannot be null: leave it out to keep 0.0",
        ),
        (["--batch_size=8"], "no key 'batch_size'; --print_config"),
        (["--trainer.devices=3"], "global batch of 8 does not divide among 3 ranks: set batch_size to 6 or 9"),
    ],
)
def test_bad_settings_are_one_sentence(
    recipe: str, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", recipe, "--run", str(run), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("diffzoo: ")
    assert re.search(message, said)
    assert not list(run.glob("checkpoints/*"))


def test_a_directory_with_a_run_is_not_written_over(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", recipe, "--run", str(run), "--trainer.max_steps=2"]) == 0
    before = (run / "metrics.csv").read_bytes()
    assert main(["fit", "-c", recipe, "--run", str(run)]) == 2
    assert "already holds a run: continue it with --resume auto" in capsys.readouterr().err
    assert main(["fit", "-c", recipe, "--run", str(run), "--trainer.max_stps", "9"]) == 2
    assert "did you mean 'trainer.max_steps'" in capsys.readouterr().err
    assert (run / "metrics.csv").read_bytes() == before


def test_the_quickstart_ends_with_images_a_verdict_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = find_recipe(quickstart.RECIPE).read_text()
    for full, few in {"per_class: 8, final_steps: 50": "per_class: 1, final_steps: 2", "steps: 30": "steps: 2"}.items():
        assert full in short
        short = short.replace(full, few)
    (tmp_path / "short.yaml").write_text(short)
    monkeypatch.setattr(quickstart, "RECIPE", str(tmp_path / "short.yaml"))
    monkeypatch.setattr(quickstart, "JUDGED", 4)
    run = tmp_path / "quickstart"
    assert main(["quickstart", "--steps", "2", "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "1.6 M parameters" in shown
    assert "3000 images in 10 classes" in shown
    assert "the samples are not finished: train longer" in shown
    last = shown.strip().splitlines()[-3:]
    assert last[0].startswith("trained 2 steps")
    assert str(run / "samples" / "final.png") in last[0]
    command = last[2].split("diffzoo ", 1)[1].replace("--steps 50", "--steps 2").replace("0-15", "0-1")
    out = tmp_path / "grid.png"
    assert main([*command.replace("grid.png", str(out)).split()]) == 0
    assert Image.open(out).size == (2 * 130 + 2, 2 * (130 + 2 * LINE) + 2)  # a long name takes two lines


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart(tmp_path: Path) -> None:
    """With nothing to generalise to, samples are the training images themselves, and each class its own."""
    from diffzoo import pipeline

    data = DemoData(image_size=32, batch_size=8, balance=True, num_workers=0)
    first: dict[int, int] = {}
    for row, label in enumerate(data.train_source.labels()):
        first.setdefault(int(label), row)
    images = tmp_path / "images"
    originals = []
    for label in range(8):
        image = Image.open(io.BytesIO(data.train_source.read_row(first[label]).image)).convert("RGB").resize((16, 16))
        (images / f"{label}").mkdir(parents=True)
        image.save(images / f"{label}" / "image.png")
        originals.append(torch.tensor(list(image.getdata()), dtype=torch.float32).view(16, 16, 3))
    path = tmp_path / "overfit.yaml"
    path.write_text(f"""
model:
  network: simple_uvit_xs_32
  network_args: {{image_size: 16, num_classes: 8}}
  sampler: {{class_path: DDIM, init_args: {{steps: 20, clip: 1.0}}}}
  optimizer: {{class_path: diffzoo.training.FusedAdamW, init_args: {{lr: 2.0e-3, betas: [0.9, 0.99]}}}}
  condition_dropout: 0.0
  weighting: {{class_path: UniformV}}
data:
  class_path: ImageFolder
  init_args: {{path: {images}, image_size: 16, batch_size: 8, num_workers: 0, flip: false}}
trainer:
  max_steps: 3000
  accelerator: cpu
  logger: false
""")
    assert main(["fit", "-c", str(path), "--run", str(tmp_path / "run")]) == 0
    drawn = torch.from_numpy(pipeline(tmp_path / "run", weights="raw")(list(range(8)), seeds=[1]).pixels).float()
    distance = torch.stack([torch.stack([(d - o).square().mean().sqrt() for o in originals]) for d in drawn])
    assert distance.argmin(1).tolist() == list(range(8))
    assert float(distance.diag().max()) < 0.35 * float(distance[~torch.eye(8, dtype=torch.bool)].min())


@pytest.mark.parametrize("micro", [8, 4])
def test_data_that_fails_leaves_a_checkpoint(recipe: str, tmp_path: Path, capsys, micro: int) -> None:
    """An image that cannot be read ends the run between two steps; once it is whole, the run goes on as if it had
    never failed."""
    data = write_images(tmp_path / "images", [f"{i:03d}.png" for i in range(48)], (32, 32))
    command = ["fit", "-c", recipe, "--data", "ImageFolder", f"--data.init_args.path={data}", "--trainer.max_steps=6",
               "--data.init_args.image_size=32", "--data.init_args.batch_size=8", "--data.init_args.num_workers=0",
               f"--data.init_args.micro_batch_size={micro}", "--model.network_args.num_classes=0",
               "--data.init_args.on_bad_image=error", "--trainer.limit_val_batches=0",
               "--trainer.callbacks={class_path: Checkpointing, init_args: {every_minutes: 60}}"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--run", str(whole)]) == 0
    order = ImageFolder(str(data), image_size=32, batch_size=8, num_workers=0).order
    victim = data / f"{order.place(3 * 8 + 5).row:03d}.png"  # in the fourth step
    content = victim.read_bytes()
    victim.write_bytes(content[:40] + bytes(len(content) - 40))  # of the same size: the data set is still the same
    capsys.readouterr()
    assert main([*command, "--run", str(parts)]) != 0
    assert "cannot decode" in capsys.readouterr().err
    assert [p.name for p in (parts / "checkpoints").glob("*.ckpt")] == ["step_00000003.ckpt"]
    victim.write_bytes(content)
    assert main([*command, "--run", str(parts), "--resume", "auto"]) == 0
    for name, value in newest(whole)["state_dict"].items():
        assert torch.equal(newest(parts)["state_dict"][name], value), name


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_a_sentence_and_a_checkpoint(recipe: str, tmp_path: Path) -> None:
    """As when memory runs out: the system kills a worker while the main process is anywhere in a step."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "diffzoo", "fit", "-c", recipe, "--run", str(run), "--trainer.max_steps=5000",
               "--data.init_args.num_workers=2", "--trainer.limit_val_batches=0",
               "--trainer.callbacks={class_path: Checkpointing, init_args: {every_minutes: 60}}"]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        metrics_file, deadline = run / "metrics.csv", time.monotonic() + 90
        while not metrics_file.exists() or len(metrics_file.read_text().splitlines()) < 5:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 2
    assert "diffzoo: a data worker was killed, most likely because memory ran out" in error
    assert "Traceback" not in error
    assert len(list((run / "checkpoints").glob("step_*.ckpt"))) == 1
    assert main([*command[3:], "--resume", "auto", f"--trainer.max_steps={newest(run)['global_step'] + 2}"]) == 0


SCHEDULED = (
    "--model.lr_scheduler={class_path: diffzoo.training.WarmupLinear, init_args: {warmup_steps: 2, total_steps: %d}}"
)
OPTIMIZER = "--model.optimizer.init_args."


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `RECIPE` with a schedule, ended after 4 of its 6 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "tiny.yaml").write_text(RECIPE)
    assert main([*resumable(folder), "--trainer.max_steps=4"]) == 0
    return folder


def resumable(folder: Path) -> list[str]:
    return ["fit", "-c", str(folder / "tiny.yaml"), "--run", str(folder / "run"), SCHEDULED % 12,
            "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rates", "settings"),
    [
        # linear from 1e-3 at step 2 to 0 at step 12: the rates after 5 and 6 steps are those of steps 6 and 7
        ([], [6e-4, 5e-4], {}),
        (
            [f"{OPTIMIZER}lr=5e-3", f"{OPTIMIZER}weight_decay=0.25", f"{OPTIMIZER}betas=[0.5,0.75]"],
            [3e-3, 2.5e-3],
            {"weight_decay": 0.25, "betas": (0.5, 0.75)},
        ),
        ([SCHEDULED % 22], [8e-4, 7.5e-4], {}),
        (["--model.lr_scheduler=null", f"{OPTIMIZER}lr=7e-3"], [7e-3, 7e-3], {}),
        (
            ["--model.lr_scheduler={class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}"],
            [1e-3 * 0.5**5, 1e-3 * 0.5**6],
            {},
        ),
    ],
    ids=["nothing", "optimizer", "schedule", "no schedule", "another schedule"],
)
def test_the_recipe_wins_over_the_checkpoint(
    stopped: Path, tmp_path: Path, change: list[str], rates: list[float], settings: dict[str, Any]
) -> None:
    """Settings of the optimizer after a resume are those of the recipe at hand; without a change, as if never
    stopped."""
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    assert main([*resumable(folder), "--resume", "auto", *change]) == 0
    logged = {int(r["step"]): float(r["train/learning_rate"]) for r in metrics(folder / "run") if r["train/loss"]}
    assert [logged[5], logged[6]] == pytest.approx(rates)
    for group in newest(folder / "run")["optimizer_states"][0]["param_groups"]:
        assert {k: group[k] for k in settings} == settings


def test_another_kind_of_data_is_refused(recipe: str, tmp_path: Path, capsys) -> None:
    command = ["fit", "-c", recipe, "--run", str(tmp_path / "run"), "--trainer.limit_val_batches=0",
               "--trainer.callbacks=null"]  # fmt: skip
    assert main([*command, "--trainer.max_steps=2"]) == 0
    folder = write_images(tmp_path / "other", [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(8)])
    capsys.readouterr()
    other = [*command, "--data.folder", str(folder), "--resume", "auto"]
    assert main(other) == 2
    assert (
        "this run was trained on DemoData, and its position in it means nothing in ImageFolder"
        in capsys.readouterr().err
    )
    assert newest(tmp_path / "run")["global_step"] == 2
    same = ["--model.network_args.num_classes=10", "--data.init_args.allow_changed_source=true"]
    assert main([*other, *same, "--trainer.max_steps=3"]) == 0


def test_metrics_csv_is_written_beside_any_logger(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    logger = f"--trainer.logger={{class_path: TensorBoardLogger, init_args: {{save_dir: {tmp_path / 'elsewhere'}}}}}"
    assert main(["fit", "-c", recipe, "--run", str(run), "--trainer.max_steps=2", logger]) == 0
    assert [int(r["step"]) for r in metrics(run) if r["train/loss"]] == [1, 2]
    assert (tmp_path / "elsewhere").is_dir()
    assert not (run / "tensorboard").exists()
