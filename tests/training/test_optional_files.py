"""A full disk costs logs and images, not the run: one warning each, and what can be written later is there."""

import csv
import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from diffzoo.cli.main import main
from diffzoo.tensors import write_tensors
from diffzoo.training import held_out, previews
from diffzoo.training.module import DiffusionModule
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.training_log import CsvLog

RECIPE = """
model:
  network: simple_uvit_xs_32
  network_args: {num_classes: 10, width_at: {16: 16, 8: 32}, depth_at: {8: 1}}
  sampler: {class_path: DDIM, init_args: {steps: 2, clip: 1.0}}
  optimizer: {class_path: diffzoo.training.FusedAdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: DemoData
  init_args: {image_size: 32, batch_size: 8, num_workers: 0, cache: false}
trainer:
  max_steps: 6
  log_every_n_steps: 1
  limit_val_batches: 1
  val_check_interval: 3
  check_val_every_n_epoch: null
  accelerator: cpu
  callbacks:
    - {class_path: SampleGrid, init_args: {every_n_steps: 2, classes: [0], per_class: 2}}
    - class_path: diffzoo.training.HeldOutDistance
      init_args: {metric: "frechet:random-conv", every_n_steps: 2, n: 8, patience: 2, min_delta: 0.99}
    - {class_path: diffzoo.training.MemorisationReport, init_args: {network: random-conv, n: 4}}
"""


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "could not be written" in str(w.message)]


def test_a_run_on_a_full_disk_ends_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every file that a run can do without fails to be written; checkpoints, written another way, are there."""
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    monkeypatch.setattr("diffzoo.training.training_log._write", full)
    monkeypatch.setattr(previews, "save_image", full)
    monkeypatch.setattr(held_out, "report", full)
    monkeypatch.setattr("safetensors.torch.save_file", full_in_rust)
    monkeypatch.setattr("diffzoo.recipe.command.write_text", full)  # config.yaml
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["fit", "-c", str(recipe), "--run", str(run)]) == 0
    names = ("config.yaml", "metrics.csv", "tensorboard", "samples", "best", "memorisation.json")
    assert sorted(said(caught)) == sorted(
        f"{run / name} could not be written (No space left on device): training goes on without it" for name in names
    )
    assert [p.name for p in (run / "checkpoints").glob("*.ckpt")] == ["step_00000006.ckpt"]
    assert "the weights of that step could not be written" in capsys.readouterr().out


def test_adapters_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        interrupted, default_root_dir = False, str(tmp_path)

    module = DiffusionModule("simple_uvit_xs_32", {"width_at": {16: 16, 8: 32}, "depth_at": {8: 1}})
    module.lora, module._trainer = object(), Trainer()
    monkeypatch.setattr(DiffusionModule, "write_weights", full)
    with pytest.warns(UserWarning, match="adapter could not be written"):
        module.on_train_end()


def test_rows_come_back_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a row of which half was written, and a new column that was not."""
    log = CsvLog(tmp_path)
    log.log_metrics({"a": 1.0}, 1)
    writerow = csv.DictWriter.writerow

    def half(self: Any, row: Any) -> None:
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write("2,0.")
        full()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(csv.DictWriter, "writerow", half)
        log.log_metrics({"a": 2.0}, 2)
        monkeypatch.setattr(csv.DictWriter, "writerow", writerow)
        monkeypatch.setattr("diffzoo.training.training_log.write_text", full)
        log.log_metrics({"b": 3.0}, 3)
        monkeypatch.undo()
    assert len(said(caught)) == len(caught) == 1
    log.log_metrics({"b": 4.0}, 4)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"step": "1", "a": "1", "b": ""}, {"step": "4", "a": "", "b": "4"}]


def test_only_the_disk_is_forgiven(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_or_warn(tmp_path / "x", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="x could not be written"):
        assert not write_or_warn(tmp_path / "x", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not write_or_warn(tmp_path / "x", full)  # it was said
        assert write_or_warn(tmp_path / "x", lambda: None)


def test_wrapped_errors_are_the_disks_too(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_in_rust)
        with pytest.warns(UserWarning, match="best could not be written"):
            assert not write_or_warn(folder, lambda: write_tensors(folder / "model.safetensors", {"w": torch.ones(2)}))
