"""Skip steps that would ruin the weights.

A step is bad when the norm of its gradient is not finite, or many times the usual. The gradient is looked at, not the
loss, because after the reduction over processes all of them see the same gradient and so decide alike.

Whether a step is bad is a number on the device. Fused optimizers take it from there (`found_inf`, as with
gradient scalers) and leave weights, moments and step counter as they are, so the host waits for nothing; it reads
what happened every few steps. Other optimizers are kept from stepping by the host, which costs one read per step.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from diffzoo.errors import UserError
from diffzoo.training.checkpointing import Checkpointing
from diffzoo.training.gradients import gradient_norm, release, steps_on_device
from diffzoo.training.steps import StepCallback, callback_of

__all__ = ["GradientGuard"]

NAMED = 64  # samples of a bad batch that a message lists


class GradientGuard(StepCallback):
    """Skips bad steps or stops at the first, counts them, and names the samples.

    Stopping leaves the weights as they were before the bad step, saves them (where the run has `Checkpointing`) and
    raises an error with the ids of the batch. The norms it computes are in `last_norm`, on the device.

    Args:
        on_bad: "skip" or "stop".
        max_in_a_row: with "skip", stop after this many bad steps without a good one between.
        spike: a norm this many times the running mean is bad; 0 = only norms that are not finite.
        spike_after: steps before spikes are looked for.
        check_every: steps between two looks from the host on an accelerator; on the CPU it looks at every step.

    Raises:
        UserError: for an unknown `on_bad` or an impossible number; while training, when it stops.
    """

    def __init__(
        self,
        on_bad: str = "skip",
        max_in_a_row: int = 10,
        spike: float = 100.0,
        spike_after: int = 200,
        check_every: int = 25,
    ):
        if on_bad not in ("skip", "stop"):
            raise UserError(f"on_bad must be 'skip' or 'stop', got {on_bad!r}")
        if max_in_a_row < 1 or check_every < 1:
            raise UserError("max_in_a_row and check_every must be at least 1")
        if spike and spike <= 1:
            raise UserError(f"spike must be above 1, or 0 for none, got {spike}")
        self.on_bad, self.max_in_a_row = on_bad, max_in_a_row
        self.spike, self.spike_after, self.check_every = spike, spike_after, check_every
        self.skipped = 0
        self.last_norm: Tensor | None = None
        self._in_a_row = self._steps = 0
        self._mean: Tensor | None = None
        self._verdicts: list[tuple[int, Tensor, Tensor]] = []  # since the last look: step, bad, norm
        self._ids: deque[tuple[int, list[object]]] = deque(maxlen=4096)
        self._flagged: list[Optimizer] = []

    # -- the verdict

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """Whether a step with this gradient norm is bad; a bool on the device. Takes good norms into the mean."""
        bad = ~torch.isfinite(norm)
        self._mean = torch.zeros_like(norm) if self._mean is None else self._mean.to(norm.device)
        if self.spike and self._steps >= self.spike_after:
            bad = bad | (norm > self.spike * self._mean)
        rate = max(0.01, 1 / (self._steps + 1))  # a plain mean at first, then over the last hundred steps
        self._mean = torch.where(bad, self._mean, torch.lerp(self._mean, norm, rate))
        self._steps += 1
        return bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        norm = self.last_norm = gradient_norm(optimizer)
        if norm is None:
            return
        bad = self.judge(norm)
        self._verdicts.append((trainer.global_step, bad, norm))
        if steps_on_device(optimizer, trainer):
            optimizer.found_inf = bad.float().reshape(())  # type: ignore[attr-defined]
            self._flagged.append(optimizer)
        elif bool(bad):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

    # -- what came of it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._ids.append((self._step, list(getattr(pl_module, "last_ids", None) or [])))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in self._flagged:
            release(optimizer)
        self._flagged = []
        interval = self.check_every if module.device.type != "cpu" else 1
        if self._step % interval == 0 or len(self._verdicts) >= interval:
            self.look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Read the verdicts since the last look; warn, count or stop."""
        verdicts, self._verdicts = self._verdicts, []
        if not verdicts:
            return
        flags = torch.stack([bad for _, bad, _ in verdicts]).tolist()  # the one wait for the device
        for (step, _, norm), bad in zip(verdicts, flags, strict=True):
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if not bad:
                continue
            self.skipped += 1
            if self.on_bad == "stop" or self._in_a_row >= self.max_in_a_row:
                self._stop(trainer, step, float(norm))
            rank_zero_warn(
                f"step {step + 1} was skipped: the norm of its gradient was {float(norm):g}; "
                f"samples {_list(self._ids_of(step))}; {self.skipped} skipped so far"
            )

    def _stop(self, trainer: Trainer, step: int, norm: float) -> None:
        ids = self._ids_of(step)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            gathered: list[list[object]] = [[]] * trainer.world_size
            torch.distributed.all_gather_object(gathered, ids)
            ids = [i for part in gathered for i in part]
        keeper = callback_of(trainer, Checkpointing)
        saved = keeper.save(trainer) if keeper is not None else None
        where = f"the last good weights are in {saved}" if saved else "the weights are the last good ones"
        many = f", number {self._in_a_row} in a row that is bad" if self._in_a_row > 1 else ""
        raise UserError(
            f"training stopped at step {step + 1}{many}: the norm of its gradient was {norm:g}; {where}; its samples: "
            f"{_list(ids)}. Look at these samples, lower the learning rate, or train in bf16-mixed instead of 16-mixed"
        )

    def _ids_of(self, step: int) -> list[object]:
        return [i for s, ids in self._ids if s == step for i in ids]

    # -- exact resume

    def state_dict(self) -> dict[str, object]:
        mean = None if self._mean is None else self._mean.cpu()
        return {"skipped": self.skipped, "steps": self._steps, "in_a_row": self._in_a_row, "mean": mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._steps = state_dict["skipped"], state_dict["steps"]
        self._in_a_row, self._mean = state_dict["in_a_row"], state_dict["mean"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        self._verdicts = []


def _list(ids: Sequence[object]) -> str:
    if not ids:
        return "unknown (the data has no ids)"
    shown = ", ".join(str(i) for i in ids[:NAMED])
    return f"{shown} and {len(ids) - NAMED} more" if len(ids) > NAMED else shown
