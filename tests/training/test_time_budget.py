"""Training for a time: the steps and the learning rate follow the plan, also after a resume."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from data.stand_ins import quiet_trainer
from torch.utils.data import DataLoader

from diffzoo.errors import UserError
from diffzoo.training import WarmupLinear, time_budget
from diffzoo.training.time_budget import TimeBudget

pytestmark = pytest.mark.filterwarnings("ignore")


class Clock:
    """Every step takes one second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(time_budget.time, "monotonic", lambda: self.now)


class Line(L.LightningModule):
    def __init__(self, clock: Clock):
        super().__init__()
        self.layer, self.clock, self.rates = torch.nn.Linear(1, 1), clock, []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += 1
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": WarmupLinear(optimizer, total_steps=1000), "interval": "step"},
        }


def fit(clock: Clock, budget: TimeBudget, folder: Path, **options: object) -> tuple[L.Trainer, Line]:
    module = Line(clock)
    checkpoint = options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, max_steps=1000, callbacks=[budget], **options)
    trainer.fit(module, DataLoader(torch.ones(8, 1), 1), ckpt_path=checkpoint)
    return trainer, module


def test_training_ends_with_its_time_and_the_learning_rate_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer, module = fit(Clock(monkeypatch), TimeBudget(2, fewest=10, most=1000), tmp_path)
    assert trainer.global_step == 120
    assert module.rates[-1] == pytest.approx(1 - 120 / 120, abs=0.02)
    assert module.rates[60] == pytest.approx(1 - 61 / 120, abs=0.01)


def test_a_slow_machine_trains_the_fewest_steps_and_says_how_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(Clock(monkeypatch), TimeBudget(1, fewest=300, most=1000), tmp_path)
    assert trainer.global_step == 300
    assert "300 steps in about 5 minutes, longer than the 1 that were asked for" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 50:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                raise KeyboardInterrupt

    budget = TimeBudget(2, fewest=10, most=1000)
    module = Line(Clock(monkeypatch))
    trainer = quiet_trainer(tmp_path, max_steps=1000, callbacks=[budget, Stop()])
    with pytest.raises(BaseException):  # noqa: B017, PT011  Lightning leaves by SystemExit
        trainer.fit(module, DataLoader(torch.ones(8, 1), 1))
    again, _ = fit(Clock(monkeypatch), TimeBudget(2, fewest=10, most=1000), tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert again.global_step == 120


@pytest.mark.parametrize(("minutes", "fewest", "most"), [(0, 1, 2), (1, 0, 2), (1, 3, 2)])
def test_impossible_budgets(minutes: float, fewest: int, most: int) -> None:
    with pytest.raises(UserError, match="expected positive minutes and fewest <= most"):
        TimeBudget(minutes, fewest, most)
