"""Learning-rate schedules: a warm-up and what comes after it, as factors of the stated learning rate.

In a recipe, with steps of the optimizer as the unit:

    lr_scheduler:
      class_path: diffzoo.training.schedules_lr.WarmupCosine
      init_args: {warmup_steps: 5000, total_steps: 400000}

Each class is an ordinary `LRScheduler`, so that its state is part of a checkpoint. After n steps the factor is that of
step n + 1, the next to be taken: the first step of a warm-up over w steps uses 1/w of the learning rate, step w all.
"""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffzoo.errors import UserError, lacks

__all__ = ["WarmupConstant", "WarmupCosine", "WarmupInverseSqrt", "WarmupLinear"]


class _Warmup(LRScheduler):
    """Linear warm-up over `warmup_steps`, then `after(step)`."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0):
        if warmup_steps < 0:
            raise UserError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Share of the learning rate in step number `step`, counted from 1."""
        return step / self.warmup_steps if step < self.warmup_steps else self.after(step)

    def after(self, step: int) -> float:
        raise lacks(self, "after")

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch + 1) for base in self.base_lrs]


class WarmupConstant(_Warmup):
    """A linear warm-up to the learning rate, which then stays."""

    def after(self, step: int) -> float:
        return 1.0


class _WarmupDecay(_Warmup):
    """A linear warm-up, then a decay to `final` times the learning rate at `total_steps`, where it stays.

    Args:
        optimizer: supplied by the trainer.
        total_steps: step at which the decay ends.
        warmup_steps: steps until the full learning rate.
        final: share of the learning rate that is left at the end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final: float = 0.0):
        if total_steps <= warmup_steps:
            raise UserError(f"total_steps ({total_steps}) must be more than warmup_steps ({warmup_steps})")
        if not 0 <= final <= 1:
            raise UserError(f"final is a share of the learning rate and must lie in [0, 1], got {final}")
        self.total_steps, self.final = total_steps, final
        super().__init__(optimizer, warmup_steps)

    def _progress(self, step: int) -> float:
        """From 0 at the end of the warm-up to 1 at the last step."""
        return min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))


class WarmupCosine(_WarmupDecay):
    """A linear warm-up, then half a cosine down to `final` times the learning rate at `total_steps`."""

    def after(self, step: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * self._progress(step))) / 2


class WarmupLinear(_WarmupDecay):
    """A linear warm-up, then a straight line down to `final` times the learning rate at `total_steps`."""

    def after(self, step: int) -> float:
        return 1 - (1 - self.final) * self._progress(step)


class WarmupInverseSqrt(_Warmup):
    """A linear warm-up, then constant to `decay_from`, then falling as 1/sqrt(step), as EDM2 does (arXiv:2312.02696).

    EDM2's rule is lr / sqrt(max(t / t_ref, 1)) (Eq. 67 there), with `decay_from` for t_ref.

    Args:
        optimizer: supplied by the trainer.
        decay_from: step at which the decay begins; default: where the warm-up ends.
        warmup_steps: steps until the full learning rate.
    """

    def __init__(self, optimizer: Optimizer, decay_from: int | None = None, warmup_steps: int = 0):
        start = warmup_steps if decay_from is None else decay_from
        if start < 1 or start < warmup_steps:
            raise UserError(f"the decay must begin at step 1 or later and after the warm-up, got {start}")
        self.decay_from = start
        super().__init__(optimizer, warmup_steps)

    def after(self, step: int) -> float:
        return 1 / math.sqrt(max(step / self.decay_from, 1.0))
