"""The numbers of a run, against numbers summed by hand; the CSV through kills and resumes."""

import csv
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from data.stand_ins import quiet_trainer
from torch import nn

from diffzoo.errors import UserError
from diffzoo.runs import list_checkpoints
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.guards import GradientGuard
from diffzoo.training.training_log import CsvLog, TrainingLog


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(4, 4)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch_idx)
        x = torch.randn(batch["image"].shape, generator=generator)
        loss = (self.network(x) - x).square().mean(1)
        self.last_losses = (torch.randn(len(x), generator=generator) * 8, loss.detach())
        self.seen.append(self.last_losses)
        return loss.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.05)


def fit(folder: Path, steps: int, **options) -> Module:
    module = Module()
    callbacks, ckpt_path = [GradientGuard(), TrainingLog(4), Checkpointing(3, 0)], options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=True, **options)
    data = [{"image": torch.zeros(4, 4), "index": torch.arange(4)} for _ in range(100)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return module


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_summed_by_hand(tmp_path: Path) -> None:
    module = fit(tmp_path, 8)
    table = rows(tmp_path)
    assert [r["step"] for r in table] == ["4", "8"]
    logsnr, loss = (torch.cat(v).double() for v in zip(*module.seen[4:8], strict=True))
    assert float(table[1]["train/loss"]) == pytest.approx(float(loss.mean()))
    for name, low, high in (("min_-10", -1e9, -10), ("-2_0", -2, 0), ("10_max", 10, 1e9)):
        inside = loss[(logsnr >= low) & (logsnr < high)]
        held = table[1].get(f"train/loss_logsnr_{name}") or None
        assert (held is None) == (len(inside) == 0)
        if held is not None:
            assert float(held) == pytest.approx(float(inside.mean()))
    assert table[1]["speed/images_seen"] == "32"
    assert float(table[1]["train/learning_rate"]) == pytest.approx(0.05)
    assert float(table[1]["speed/images_per_second"]) > 0
    gradient = torch.cat([p.grad.reshape(-1) for p in module.network.parameters()])
    assert float(table[1]["train/gradient_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_accumulation_counts_all_images(tmp_path: Path) -> None:
    module = fit(tmp_path, 4, accumulate_grad_batches=2)
    table = rows(tmp_path)
    assert [r["step"] for r in table] == ["4"]
    assert table[0]["speed/images_seen"] == "32"
    loss = torch.cat([v for _, v in module.seen]).double()
    assert float(table[0]["train/loss"]) == pytest.approx(float(loss.mean()))


def test_resumed_curve_is_the_undisturbed_one(tmp_path: Path) -> None:
    """From a checkpoint in the middle of a logging window; rows of steps taken again are not there twice."""
    fit(tmp_path / "whole", 12)
    fit(tmp_path / "run", 9)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("9,0.12")  # a line cut short by a kill
    six = list_checkpoints(tmp_path / "run")[1]
    assert six.name == "step_00000006.ckpt"
    fit(tmp_path / "run", 12, ckpt_path=six)
    whole, run = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert len(whole) == len(run) == 3
    for a, b in zip(whole, run, strict=True):
        assert {k: v for k, v in a.items() if "per_second" not in k} == {
            k: v for k, v in b.items() if "per_second" not in k
        }


def test_columns_may_come_later(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    log.log_metrics({"a": 1.0}, 1)
    log.log_metrics({"b": 2.5, "epoch": 3}, 2)
    log.log_metrics({"a": 3.0, "b": 1e-9}, 3)
    assert rows(tmp_path) == [
        {"step": "1", "a": "1", "b": ""},
        {"step": "2", "a": "", "b": "2.5"},
        {"step": "3", "a": "3", "b": "1e-09"},
    ]
    again = CsvLog(tmp_path)
    again.rewind(2)
    again.log_metrics({"b": 4.0}, 3)
    assert [r["b"] for r in rows(tmp_path)] == ["", "2.5", "4"]
    again.rewind(0)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"logsnr_edges": (1.0, 0.0)}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(UserError):
        TrainingLog(**settings)
