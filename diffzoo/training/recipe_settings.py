"""A resumed run follows its recipe: what was changed there wins over what the checkpoint stores.

Optimizers and learning-rate schedules write their settings into checkpoints and take them back on a resume, so that a
new learning rate in the recipe would be ignored without a word. A checkpoint therefore also holds the settings as the
recipe made them; where those of the recipe at hand differ, they are set again after the resume. What the recipe leaves
as it was is not touched, so that a resume with the same recipe stays exact.
"""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Settings", "apply_changes", "settings_of"]

Settings = dict[str, Any]


def settings_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> Settings:
    """The settings of both before the first step, in types that a checkpoint can hold."""
    groups = [_plain({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    kind = type(scheduler).__name__ if scheduler is not None else None
    return {"groups": groups, "scheduler": _plain(vars(scheduler)) if scheduler is not None else {}, "kind": kind}


def apply_changes(
    optimizer: Optimizer, scheduler: LRScheduler | None, theirs: Settings, ours: Settings, step: int
) -> list[str]:
    """Set what the recipe changed; the names of what was.

    Args:
        optimizer: after its state was restored.
        scheduler: likewise.
        theirs: `settings_of` the run that wrote the checkpoint.
        ours: `settings_of` this run.
        step: optimizer steps taken.
    """
    changed = set()
    for group, old, new in zip(optimizer.param_groups, theirs["groups"], ours["groups"], strict=True):
        for name in _differing(old, new):
            group[name] = new[name]
            changed.add(name)
    other_kind = theirs["kind"] != ours["kind"]
    if scheduler is not None:
        differing = list(ours["scheduler"]) if other_kind else _differing(theirs["scheduler"], ours["scheduler"])
        for name in differing:
            setattr(scheduler, name, ours["scheduler"][name])
            changed.add(name)
        if other_kind:
            scheduler.last_epoch = step
        if changed:
            _set_rates(optimizer, scheduler, theirs, ours)
    if other_kind:
        changed.add("lr_scheduler")
    hidden = {"_last_lr", "base_lrs", "initial_lr", "last_epoch", "_step_count"}  # what follows from the others
    return sorted({"lr" if name == "base_lrs" else name for name in changed} - hidden)


def _set_rates(optimizer: Optimizer, scheduler: LRScheduler, theirs: Settings, ours: Settings) -> None:
    """The learning rates that the schedule gives now."""
    closed_form = getattr(scheduler, "_get_closed_form_lr", None)
    if getattr(scheduler, "factor", None) is not None:  # ours are functions of the step alone
        rates = [float(rate) for rate in scheduler.get_lr()]
    elif closed_form is not None:
        rates = [float(rate) for rate in closed_form()]
    else:  # known only as a chain of steps from the first rate: all of it scales with that
        before = theirs["scheduler"].get("base_lrs") or ours["scheduler"]["base_lrs"]
        now = ours["scheduler"]["base_lrs"]
        last: list[Any] = scheduler.get_last_lr()
        rates = [
            float(rate) * new / old if old else float(new) for rate, old, new in zip(last, before, now, strict=True)
        ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def _differing(old: Settings, new: Settings) -> list[str]:
    return [name for name, value in new.items() if name not in old or old[name] != value]


def _plain(values: dict[str, Any]) -> Settings:
    """Numbers, words, and lists of them."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(is_plain(v) for v in value)
        return value is None or isinstance(value, (bool, int, float, str))

    return {k: v for k, v in values.items() if is_plain(v)}
