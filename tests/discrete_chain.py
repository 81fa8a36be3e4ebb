"""Discrete chains as their papers write them: tables over all kept steps, from the package's formula of one step."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffzoo.process import DiscreteBetas
from diffzoo.process.discrete import ReverseStep, kept_steps, reverse_step


@dataclass(frozen=True)
class RespacedSteps:
    """A chain of kept steps and its tables, ascending; entry i is the step from kept index i to the one before it.

    Args:
        schedule: the full chain.
        respacing: as in `kept_steps`.
    """

    schedule: DiscreteBetas
    respacing: str | int | None = None

    @cached_property
    def indices(self) -> Tensor:
        """Kept indices of the full chain, which the network reads, int64 `(k,)`."""
        return torch.tensor(kept_steps(self.respacing, self.schedule.steps))

    @cached_property
    def times(self) -> Tensor:
        """Times t of the kept steps, float64 `(k,)`."""
        return (self.indices.double() + 1) / self.schedule.steps

    @cached_property
    def log_alpha(self) -> Tensor:
        """log alpha at the kept steps, float64 `(k,)`."""
        return self.schedule.log_alpha[self.indices]

    @cached_property
    def reverse(self) -> ReverseStep:
        """The reverse steps, each field `(k,)`."""
        before = torch.cat([torch.zeros(1, dtype=torch.float64), self.log_alpha[:-1]])
        steps = reverse_step(self.log_alpha, before)
        return reverse_step(self.log_alpha, before, steps.log_variance[1] if len(before) > 1 else None)

    def step(self, index: Tensor | int) -> ReverseStep:
        """The reverse steps at some indices of the chain."""
        return ReverseStep(*(field[index] for field in self.reverse))
