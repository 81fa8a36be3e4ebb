"""What goes wrong around a run, each in one sentence; and the trial run that finds it before."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.stand_ins import write_images
from safetensors.torch import save_file

from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.process import GaussianProcess
from diffzoo.recipe import dry_run
from diffzoo.recipe.files import stated_version
from diffzoo.recipe.parse import read_recipe
from diffzoo.recipe.plan import advice, plan_content
from diffzoo.runs import RunLock
from diffzoo.sampling import DDIM, DPMSolver
from diffzoo.training import gpus
from diffzoo.training.gpus import GIB, GPU
from diffzoo.training.module import DiffusionModule
from diffzoo.training.planning import NetworkCost, Plan

# Lightning's own: few workers, deprecated parts of torch
pytestmark = [
    pytest.mark.usefixtures("without_report"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

RECIPE = """
model:
  network: simple_uvit_xs_32
  network_args: {num_classes: 10, width_at: {16: 16, 8: 32}, depth_at: {8: 1}}
  sampler: {class_path: DDIM, init_args: {steps: 2, clip: 1.0}}
  optimizer: {class_path: diffzoo.training.FusedAdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: DemoData
  init_args: {image_size: 32, batch_size: 24, num_workers: 0, cache: false}
trainer:
  max_steps: 2
  limit_val_batches: 0
  accelerator: cpu
  callbacks:
    - {class_path: SampleGrid, init_args: {every_n_steps: 0, classes: [0], per_class: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def failed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["fit", *arguments]) == 2
    return capsys.readouterr().err


# -- memory


def test_out_of_memory_names_the_setting_that_fits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def step(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    plan, _ = plan_content(read_recipe(str(recipe)), "")
    # a card on which 8 of the 24 images fit, and 12 do not
    wanted = (plan.training(8) + plan.training(12)) / 2
    card = GPU("toy", (wanted + 0.8 * GIB) / (1 - 0.06), 1)
    assert abs(card.usable - wanted) < 1
    monkeypatch.setattr(DiffusionModule, "training_step", step)
    monkeypatch.setattr(gpus, "this_gpu", lambda: card)
    said = failed(capsys, "-c", str(recipe), "--run", str(tmp_path / "run"))
    assert "out of memory with 24 images at once on a toy: `diffzoo plan` expects a peak of " in said
    assert f"{plan.peak(24) / GIB:.1f} GiB of {wanted / GIB:.1f} GiB usable" in said
    assert "set --data.init_args.micro_batch_size 8, which changes memory and speed, not the result" in said
    assert "Traceback" not in said


def test_advice_falls_back_on_recomputation_and_then_on_more_devices() -> None:
    def plan(activations: float) -> Plan:
        return Plan(NetworkCost(10, 10, 1e9, activations * GIB, 0, 0, False), batch=8, evaluation_batch=0)

    card = GPU("toy", (10.0 * GIB + 0.8 * GIB) / (1 - 0.06), 1)
    assert "micro_batch_size 2," in advice(plan(4.0), plan(1.0), card, 8)  # 3 would fit, and does not divide 8
    said = advice(plan(12.0), plan(3.0), card, 8)
    assert "expects a peak of 96.0 GiB of 10.0 GiB" in said
    assert "--model.grad_checkpointing true and --data.init_args.micro_batch_size 2" in said
    assert "no micro-batch fits: shard it over more devices" in advice(plan(12.0), plan(11.0), card, 1)
    assert "something else may be using the card; set --data.init_args.micro_batch_size 4" in advice(
        plan(1.0), plan(0.5), card, 8
    )


def test_the_plan_knows_what_is_frozen(recipe: Path, tmp_path: Path) -> None:
    whole, _ = plan_content(read_recipe(str(recipe)), "")
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("model:\n", "model:\n  freeze: all_but_classes\n", 1))
    frozen, _ = plan_content(read_recipe(str(other)), "")
    assert frozen.cost.parameters == whole.cost.parameters == whole.cost.trainable
    assert frozen.cost.trainable == 11 * 128
    other.write_text(RECIPE.replace("model:\n", "model:\n  lora: {rank: 2}\n", 1))
    lora, _ = plan_content(read_recipe(str(other)), "")
    assert 11 * 128 < lora.cost.trainable < 0.3 * whole.cost.trainable
    assert lora.parts()["optimizer"] < 0.3 * whole.parts()["optimizer"]


# -- checkpoints, recipes, directories


def test_a_checkpoint_of_another_architecture_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ("-c", str(recipe), "--run", str(tmp_path / "run"))
    assert main(["fit", *run, "--trainer.max_steps=1"]) == 0
    more = (*run, "--resume", "auto")
    said = failed(capsys, *more, "--model.network_args={num_classes: 12, width_at: {16: 16, 8: 32}, depth_at: {8: 1}}")
    assert "the checkpoint is of another architecture: num_classes 10 there and 12 here" in said
    said = failed(capsys, *more, "--model.network=uvit_bao_s_32", "--model.network_args={num_classes: 10, depth: 3}")
    assert "network simple_uvit_xs_32 (SimpleUViT) there and uvit_bao_s_32 (UViTBao) here" in said
    # dropout is no part of the architecture: a resumed run may have another
    changed = "--model.network_args={num_classes: 10, width_at: {16: 16, 8: 32}, depth_at: {8: 1}, dropout: 0.1}"
    assert main(["fit", *more, changed]) == 0


def test_a_recipe_of_a_newer_version_says_so(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ("--run", str(tmp_path / "run"))
    wrong = "--model.flux_capacitor=3"
    assert "diffzoo 99" not in failed(capsys, "-c", str(recipe), *run, wrong)
    for line in ("# diffzoo 99.1.0\n", "# a recipe\n# Version:    diffzoo 99.1.0\n"):
        recipe.write_text(line + RECIPE)
        said = failed(capsys, "-c", str(recipe), *run, wrong)
        assert "there is no key 'model.flux_capacitor'" in said
        assert f"{recipe} was written for diffzoo 99.1.0 and this is " in said
        assert said.rstrip().endswith("pip install --upgrade diffzoo")
    with pytest.warns(UserWarning, match="was written for diffzoo 99.1.0 and this is"):  # though it parses
        assert main(["fit", "-c", str(recipe), *run, "--trainer.max_steps=1"]) == 0
    recipe.write_text("# diffzoo 0.0.1\n" + RECIPE)
    assert "0.0.1" not in failed(capsys, "-c", str(recipe), *run, wrong)


def test_runs_say_which_version_wrote_them(recipe: Path, tmp_path: Path) -> None:
    from diffzoo import __version__

    assert main(["fit", "-c", str(recipe), "--run", str(tmp_path / "run"), "--trainer.max_steps=1"]) == 0
    assert stated_version(tmp_path / "run" / "config.yaml") == __version__
    again = ["fit", "-c", str(tmp_path / "run" / "config.yaml"), "--run", str(tmp_path / "again")]
    assert main([*again, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'again'}"]) == 0


def test_a_run_directory_in_use_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLock(tmp_path / "run"):
        said = failed(capsys, "-c", str(recipe), "--run", str(tmp_path / "run"))
    assert "run is in use by process" in said


@pytest.mark.parametrize("place", ["/proc/no/run", "file/run"])
def test_a_run_directory_that_cannot_be_made(
    recipe: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    said = failed(capsys, "-c", str(recipe), "--run", str(tmp_path / place))
    assert re.search(r"diffzoo: the run directory .*run cannot be written to \(.*\): choose another with --run", said)


def test_a_lock_on_a_full_disk_holds_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.TextIOWrapper):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    usual = open
    monkeypatch.setattr("builtins.open", lambda *a: Full(usual(a[0], "ab+")) if ".lock" in str(a[0]) else usual(*a))
    with RunLock(tmp_path):
        monkeypatch.undo()
        with pytest.raises(UserError, match="in use by"), RunLock(tmp_path):
            pass


def test_what_no_run_can_go_on_from_is_said_before_it_starts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ("-c", str(recipe), "--run", str(tmp_path / "run"))

    def said(path: Path) -> str:
        line = failed(capsys, *run, "--resume", str(path)).splitlines()[-1]
        assert line.startswith("diffzoo: ")
        return line

    assert main(["fit", *run, "--trainer.max_steps=1"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001.ckpt"
    other = tmp_path / "other.ckpt"
    torch.save({"a": 1}, other)
    assert "holds no state of a run (state_dict, optimizer_states, loops)" in said(other)
    torch.save({"state_dict": torch.load(checkpoint, weights_only=True)["state_dict"]}, other)
    assert f"(optimizer_states, loops) to go on from: a new run starts from weights with --model.weights {other}" in (
        said(other)
    )
    other.write_bytes(b"garbage" * 100)
    assert "is no checkpoint of a run, or a damaged one" in said(other)
    weights = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2)}, weights)
    assert f"starts from weights with --model.weights {weights} in place of --resume" in said(weights)
    assert "is the directory of a run: continue it with --run" in said(tmp_path / "run")
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    assert main(["fit", *run, "--resume", str(copy)]) == 0  # without its checksum
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "is damaged (its checksum does not match)" in said(checkpoint)


def test_warnings_are_plain_sentences(recipe: Path, tmp_path: Path) -> None:
    """Nothing of the source code; that there is one before is not said of the last."""
    run = tmp_path / "run"
    for step in (1, 2):
        path = run / "checkpoints" / f"step_{step:08d}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"garbage")
    command = [sys.executable, "-m", "diffzoo", "fit", "-c", str(recipe), "--run", str(run), "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    folder = run / "checkpoints"
    why = "is damaged (its checksum does not match)"
    assert done.stderr.splitlines() == [
        f"diffzoo: warning: the checkpoint {folder}/step_00000002.ckpt {why}: trying the one before it, "
        "step_00000001.ckpt",
        f"diffzoo: warning: the checkpoint {folder}/step_00000001.ckpt {why}",
        f"diffzoo: all 2 checkpoints in {folder} are damaged: move that folder away to start anew",
    ]


def test_more_devices_than_the_batch_divides(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = failed(capsys, "-c", str(recipe), "--run", str(tmp_path / "run"), "--trainer.devices=5")
    assert "the global batch of 24 does not divide among 5 ranks: set batch_size to 20 or 25" in said


# -- the trial run


def test_a_dry_run_does_all_that_a_run_does_and_keeps_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "dry run: 64 images sampled in 2 sampler steps and measured: frechet:random-conv " in said
    assert "dry run: two steps done, previews: final.png" in said
    assert "resumed and trained to step 3; the recipe is ready" in said
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_dry_run_uses_the_recipes_own_metrics_and_the_folder_given(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path / "images", [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(3)], (32, 32))
    recipe.write_text(
        RECIPE.replace("batch_size: 24", "batch_size: 2")
        + '    - {class_path: diffzoo.training.HeldOutDistance, init_args: {metric: "frechet-spatial:random-conv"}}\n'
    )
    folder, held = ("--data.folder", str(tmp_path / "images")), "--data.init_args.val_fraction=0.5"
    assert main(["fit", "-c", str(recipe), "--dry-run", *folder, held]) == 0
    assert "measured: frechet-spatial:random-conv " in capsys.readouterr().out


def test_a_dry_run_samples_in_few_steps(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids, metrics and reports of the recipe too, in both parts of the trial; a table of steps stays as it is."""
    drawn: list[int] = []
    times = DDIM.times
    monkeypatch.setattr(DDIM, "times", lambda self, process: drawn.append(self.steps) or times(self, process))
    recipe.write_text(
        RECIPE.replace("steps: 2, clip", "steps: 1000, clip").replace("every_n_steps: 0", "every_n_steps: 1")
        + "    - {class_path: SampleGrid, init_args: {every_n_steps: 0, classes: [0], final_steps: 500}}\n"
        + "    - class_path: diffzoo.training.MemorisationReport\n"
        + "      init_args: {network: random-conv, n: 4, steps: 700}\n"
    )
    assert main(["fit", "-c", str(recipe), "--dry-run"]) == 0
    assert set(drawn) == {4}


def test_a_sampler_that_cannot_do_with_few_steps_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(sampler=DPMSolver(steps=7, order=3, method="singlestep"), process=GaussianProcess())
    monkeypatch.setattr(dry_run, "STEPS", 2)
    dry_run.FewSamplerSteps().on_train_start(SimpleNamespace(callbacks=[]), module)
    assert module.sampler.steps == 7
    monkeypatch.undo()
    dry_run.FewSamplerSteps().on_train_start(SimpleNamespace(callbacks=[]), module)
    assert module.sampler.steps == 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_dry_run_of_two_processes(recipe: Path, tmp_path: Path, launcher: str) -> None:
    front = [] if launcher == "lightning" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *front, "-m", "diffzoo", "fit", "-c", str(recipe), "--dry-run", "--trainer.devices=2",
               "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.init_args.batch_size=4"]  # fmt: skip
    place = tmp_path / "here"
    place.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(place)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for once in ("dry run: 64 images sampled", "measured: frechet:random-conv", "two steps done, previews: final.png",
                 "resuming from", "resumed and trained to step 3"):  # fmt: skip
        assert done.stdout.count(once) == 1, done.stdout  # by the first process alone
    assert not [p for p in place.iterdir() if "diffzoo" in p.name]
