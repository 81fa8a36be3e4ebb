"""Which width of the EMA is best: the loss on the held-out data of a run, over a grid of reconstructed widths."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.recipe.command import BuiltRecipe
from diffzoo.recipe.parse import plain_warnings
from diffzoo.runs import Run
from diffzoo.training.ema import EMA
from diffzoo.training.reconstruction import REACHED, mismatch, reconstruct
from diffzoo.training.snapshots import list_snapshots
from diffzoo.zoo.loading import locate

__all__ = ["sweep_widths"]


def sweep_widths(run: str, stds: Sequence[float], updates: int | None = None, batches: int = 16) -> dict[str, float]:
    """Print the loss of every width and the best; returns the losses by what is printed before them.

    The raw weights and the EMAs of a fixed decay come first for comparison, unless `updates` is given.

    Args:
        run: directory of a run with snapshots.
        stds: relative widths.
        updates: time of the EMAs in optimizer steps; None = the last snapshot.
        batches: validation batches per width.
    """
    config = Run(Path(run)).config
    if not config.is_file():
        raise UserError(f"no config.yaml in {run}: `ema sweep` needs the directory of a run, to know its data")
    snapshots = list_snapshots(run)
    end = updates or max(s.updates for s in snapshots)
    used = [(s.updates, s.std) for s in snapshots if s.updates <= end]
    options = ["--trainer.logger=false", f"--trainer.limit_val_batches={batches}"]
    built = BuiltRecipe(["fit", f"--config={config}", *options])
    callbacks = built.trainer.callbacks  # type: ignore[attr-defined]
    decays = [label for c in callbacks if isinstance(c, EMA) for label in c.labels if label not in c.stds]
    # an EMA would put its own weights in place of those that are measured
    built.trainer.callbacks = [c for c in callbacks if not isinstance(c, EMA)]  # type: ignore[attr-defined]
    built.model.network.load_state_dict(locate(run, "raw").state)
    losses = {}
    for label in () if updates else ("raw", *decays):
        losses[label] = _held_out_loss(built, locate(run, label).state)
        print(f"{label:<12} loss {losses[label]:.6f}", flush=True)
    for std in stds:
        label = f"width {std:g}"
        losses[label] = _held_out_loss(built, reconstruct(snapshots, std, end))
        off = mismatch(used, end, std)
        note = f"  (not reached: the profile is off by {100 * off:.2g} %)" if off > REACHED else ""
        print(f"{label:<12} loss {losses[label]:.6f}{note}", flush=True)
    loss, std = min((losses[f"width {std:g}"], std) for std in stds)
    print(f"best: width {std:g}, loss {loss:.6f}. Write it with `diffzoo ema reconstruct {run} --std {std:g}`")
    print("The loss prefers narrow EMAs: choose by Fréchet distance, with `diffzoo sweep guidance RUN --stds ...`")
    return losses


def _held_out_loss(built: BuiltRecipe, tensors: Mapping[str, Tensor]) -> float:
    network = built.model.network
    network.load_state_dict(network.state_dict() | dict(tensors))
    with plain_warnings():
        found = built.trainer.validate(built.model, built.datamodule, verbose=False)
    if not found or "val/loss" not in found[0]:
        raise UserError("this run's data has no held-out part: `ema sweep` has nothing to measure on")
    return float(found[0]["val/loss"])
