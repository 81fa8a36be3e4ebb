"""Training for a given time: the number of steps is planned from their measured speed."""

import time
from typing import Any

import lightning.pytorch as L

from diffzoo.errors import UserError
from diffzoo.training.schedules_lr import WarmupLinear
from diffzoo.training.steps import say

__all__ = ["TimeBudget"]

FIRST_LOOK = 30.0  # seconds of training until the first plan, and between two plans


class TimeBudget(L.Callback):
    """Ends training after a time, but not before the fewest steps that make a usable model.

    The plan is made after half a minute from the steps that were trained, validation and previews included, and made
    again every half minute until half of the time is over. `trainer.max_steps`, and the length of `WarmupLinear`,
    follow the plan. A resumed run goes on with it.

    Args:
        minutes: wall time of training.
        fewest: steps that are trained even if they take longer.
        most: steps that are not exceeded even if there is time.

    Raises:
        UserError: for a time or a number of steps that is not positive.
    """

    def __init__(self, minutes: float, fewest: int = 1500, most: int = 6000):
        if minutes <= 0 or not 0 < fewest <= most:
            raise UserError(f"expected positive minutes and fewest <= most, got {minutes:g}, {fewest} and {most}")
        self.seconds, self.fewest, self.most = 60 * minutes, fewest, most
        self.planned = most
        self._spent = self._start = self._looked = 0.0
        self._said = False

    def plan(self, steps: int, seconds: float) -> int:
        """Steps of the whole run, from the steps so far and the seconds they took."""
        return int(min(max(self.seconds * steps / seconds, self.fewest), self.most))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._looked = time.monotonic()
        self._follow(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        now = time.monotonic()
        spent = self._spent + now - self._start
        if now - self._looked < FIRST_LOOK or not trainer.global_step or (self._said and spent > self.seconds / 2):
            return
        self._looked = now
        ours = self.plan(trainer.global_step, spent)
        self.planned = max(trainer.strategy.broadcast(ours), trainer.global_step + 1)
        self._follow(trainer)
        if not self._said:
            self._said = True
            say(_sentence(self.planned, trainer.global_step / spent, self.seconds / 60), flush=True)

    def _follow(self, trainer: L.Trainer) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.planned
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupLinear):
                config.scheduler.total_steps = self.planned

    def state_dict(self) -> dict[str, object]:
        spent = self._spent + (time.monotonic() - self._start if self._start else 0.0)
        return {"planned": self.planned, "spent": spent, "said": self._said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.planned, self._spent, self._said = state_dict["planned"], state_dict["spent"], state_dict["said"]


def _sentence(steps: int, rate: float, asked: float) -> str:
    """The plan in words: steps, steps per second, and the minutes that were asked for."""
    minutes = steps / rate / 60
    text = f"{rate:.2g} steps a second: {steps} steps in about {minutes:.0f} minutes"
    if minutes > 1.2 * asked:
        text += f", longer than the {asked:g} that were asked for, because fewer steps make no recognisable classes; "
        text += "Ctrl-C stops and can be resumed"
    return text
