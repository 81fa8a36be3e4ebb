"""The directory that `diffzoo fit` writes is a source: it is sampled from, exported, pushed and pulled as it is."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import FakeHub
from PIL import Image

from diffzoo import load_any, pipeline, pull
from diffzoo.cli.main import main
from diffzoo.errors import UserError

RECIPE = """
model:
  network: simple_uvit_xs_32
  network_args: {num_classes: 10}
  process: {prediction: {class_path: X0}}
  sampler: {class_path: DDIM, init_args: {steps: 3, clip: 1.0}}
data:
  class_path: DemoData
  init_args: {image_size: 32, batch_size: 4, num_workers: 0, cache: true}
trainer:
  max_steps: 4
  limit_val_batches: 0
  accelerator: cpu
  callbacks:
    - {class_path: EMA, init_args: {decays: [0.5], stds: [0.1], snapshot_every: 2}}
    - {class_path: Checkpointing, init_args: {every_n_steps: 2}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["fit", "-c", str(folder / "recipe.yaml"), "--run", str(folder / "tiny")]) == 0
    return folder / "tiny"


def held(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


# Lightning's own: few workers, deprecated parts of torch
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@quiet
@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000004.ckpt"])
def test_the_newest_checkpoint_and_its_ema_are_taken(run: Path, place: str) -> None:
    checkpoint = held(run, 4)
    averages = checkpoint["diffzoo_averages"]["averages"]
    assert set(averages) == {"ema_0.5", "power_0.100"}
    for label, prefer in (("ema_0.5", "average"), ("power_0.100", "power_0.100")):
        loaded = load_any(run / place, weights=prefer).network.state_dict()
        assert all(torch.equal(loaded[k], v.float()) for k, v in averages[label].items())
        assert loaded.keys() == averages[label].keys()
    raw = load_any(run / place, weights="raw")
    assert all(torch.equal(v, checkpoint["state_dict"][f"network.{k}"]) for k, v in raw.network.state_dict().items())
    assert raw.metadata.name == "simple_uvit_xs_32"
    assert raw.provenance.global_step == 4
    assert raw.process.prediction.coefficients(torch.tensor(0.6), torch.tensor(0.8)) == (1, 0)
    assert raw.class_names[3] == "Flags"


@quiet
def test_a_copied_run_is_read_by_the_steps_and_not_by_the_times_of_its_files(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    (copied / "checkpoints" / "step_00000002.ckpt").touch()  # now the newest by its time
    (copied / "checkpoints" / ".step_00000009.ckpt.part").write_bytes(b"killed while this was written")
    assert load_any(copied).provenance.global_step == 4


@quiet
def test_a_snapshot_of_a_run_takes_its_metadata_from_the_newest_checkpoint(run: Path) -> None:
    assert main(["ema", "reconstruct", str(run), "--std", "0.1"]) == 0
    snapshots = [*run.glob("averages/*.safetensors"), *run.glob("averages/reconstructed/*.safetensors")]
    assert len(snapshots) == 3
    assert all(load_any(p).network.config.num_classes == 10 for p in snapshots)


@quiet
def test_the_command_samples_from_the_run(run: Path, tmp_path: Path) -> None:
    options = ["--seeds", "0-1", "--classes", "Flags", "7", "--device", "cpu", "--quiet"]
    assert main(["sample", str(run), *options, "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as image:
        record = json.loads(image.text["diffzoo"])[0]  # type: ignore[attr-defined]
    assert record["sampler"]["steps"] == 3  # that of the recipe
    assert record["weights"]["weights"] == "ema_0.5"
    assert pipeline(run, "cpu")("Flags", seeds=[0]).records[0]["drawn"] == "Flags"


@quiet
def test_export_and_push_keep_every_bit_of_the_ema(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    assert main(["push", str(run), "tester/emoji", "--licence", "mit"]) == 0
    folder = pull("tester/emoji", tmp_path / "pulled")
    assert main(["push", str(folder), "tester/again"]) == 0
    again = pull("tester/again", tmp_path / "again")
    for file in folder.iterdir():
        digests = [hashlib.sha256((place / file.name).read_bytes()).hexdigest() for place in (folder, again)]
        assert digests[0] == digests[1], file.name
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["network"] == "simple_uvit_xs_32"
    assert main(["export", str(run), str(tmp_path / "w.safetensors"), "--licence", "mit"]) == 0
    average = load_any(run).network.state_dict()
    for place in ("hf-hub:tester/emoji", folder, tmp_path / "w.safetensors"):
        loaded = load_any(place)
        assert all(torch.equal(average[k], v) for k, v in loaded.network.state_dict().items())
        assert loaded.metadata.default_sampler.steps == 3


def test_a_run_that_has_not_saved_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no weights in .*run: expected model\.safetensors"):
        load_any(tmp_path / "run")
