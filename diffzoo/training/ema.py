"""EMAs of the network's weights, several at once.

Two kinds can be kept side by side, both in float32 whatever the precision of the weights:

    exponential   label "ema_0.9999": decay 0.9999 per optimizer step, with a warm start: after n updates the decay is
                  min(decay, (1 + n) / (10 + n)). At the beginning this is the power profile with
                  γ = 8 (relative width 0.09), so that a run of 1,500 steps averages over its last few hundred steps
                  and forgets its random initialisation.
    power         label "power_0.050": the profiles of EDM2, stated by relative width (`reconstruction.py`). From
                  snapshots of them any other width can be reconstructed after training.

Only the network is averaged: its trainable parameters and its floating-point buffers that are saved. Weights that
stay as they are (frozen, integer) need no EMA. With FSDP2 every rank averages its own shard and nothing is sent;
the shards are gathered when a checkpoint or a snapshot is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from diffzoo.errors import UserError, did_you_mean
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.reconstruction import power_decay, power_gamma
from diffzoo.training.sharding import (
    clean_name,
    is_sharded,
    local_part,
    part_of_whole,
    reshard,
    shard_of,
    whole_tensor,
)
from diffzoo.training.snapshots import Snapshot, set_aside, snapshot_file, write_snapshot
from diffzoo.training.steps import StepCallback, callback_of

__all__ = ["CHECKPOINT_KEY", "EMA", "averaged"]

CHECKPOINT_KEY = "diffzoo_averages"


class _Stored(TypedDict):
    """What a checkpoint holds: number of updates, and tensors by name, for each label."""

    updates: dict[str, int]
    averages: dict[str, dict[str, Tensor]]


@contextmanager
def averaged(pl_module: LightningModule, label: str | None = None) -> Iterator[None]:
    """Put an EMA into the network for the length of the block, the first by default; without one nothing changes."""
    keeper = callback_of(pl_module._trainer, EMA) if pl_module._trainer else None
    if keeper is None:
        yield
        return
    with keeper.averaged(pl_module, label):
        yield


class EMA(StepCallback):
    """Keeps EMAs of `pl_module.network`, updated once per optimizer step.

    `averages` maps a label to the tensors by name (this rank's shards under FSDP2). `averaged` puts one EMA into the
    network for the length of a block. Validation runs on the first.

    Args:
        decays: of the exponential EMAs, per optimizer step, in [0, 1).
        stds: relative widths of the power-function EMAs, in (0, 0.2887]; EDM2 keeps 0.05 and 0.10.
        warm_start: shorten the exponential EMAs at the start of training, as above.
        snapshot_every: optimizer steps between two snapshots of the power-function EMAs; the last is written at the end
            of training.
        snapshot_dtype: "float32", or "float16" for half the disk, as EDM2 does, with rounding of 5e-4 that
            reconstruction amplifies.
        folder: where snapshots go; default: `averages` in the trainer's `default_root_dir`.
        validate_with: label of the EMA that is validated, "raw" for the weights themselves; default: the first.

    Raises:
        UserError: for widths or decays out of range or stated twice, or an unknown label.
    """

    def __init__(
        self,
        decays: Sequence[float] = (0.9999,),
        stds: Sequence[float] = (),
        warm_start: bool = True,
        snapshot_every: int = 10_000,
        snapshot_dtype: str = "float32",
        folder: str | None = None,
        validate_with: str | None = None,
    ):
        for decay in decays:
            if not 0 <= decay < 1:
                raise UserError(f"the decay of an EMA must lie in [0, 1), got {decay:g}")
        if snapshot_dtype not in ("float32", "float16"):
            raise UserError(f"snapshot_dtype must be float32 or float16, got {snapshot_dtype!r}")
        if snapshot_every < 1:
            raise UserError(f"snapshot_every must be at least 1 optimizer step, got {snapshot_every}")
        self.decays = {f"ema_{d:g}": float(d) for d in decays}
        self.stds = {f"power_{s:.3f}": float(s) for s in stds}
        self.gammas = {label: power_gamma(s) for label, s in self.stds.items()}
        if len(self.labels) < len(decays) + len(stds):
            raise UserError(f"an EMA is stated twice: decays {list(decays)}, stds {list(stds)}")
        if not self.labels:
            raise UserError("EMA has nothing to do: give it decays, stds or both, or leave it out")
        self.warm_start, self.snapshot_every = warm_start, snapshot_every
        self.snapshot_dtype = torch.float16 if snapshot_dtype == "float16" else torch.float32
        self.folder = Path(folder) if folder is not None else None
        self.validate_with = None if validate_with == "raw" else self._known(validate_with)
        self.averages: dict[str, dict[str, Tensor]] = {}
        self.updates = dict.fromkeys(self.labels, 0)
        self._sources: dict[str, Tensor] = {}
        self._loaded: _Stored | None = None
        self._raw: dict[str, Tensor] = {}  # the weights themselves while an EMA stands in for them
        self._inside: str | None = None
        self._validation = ExitStack()  # holds the EMA that is validated, for as long as that takes

    @property
    def labels(self) -> list[str]:
        """All labels, exponential EMAs first."""
        return [*self.decays, *self.stds]

    def _known(self, label: str | None) -> str:
        if label is None:
            return self.labels[0]
        if label not in self.labels:
            raise UserError(f"no EMA {label!r}{did_you_mean(label, self.labels)}")
        return label

    def decay(self, label: str, updates: int) -> float:
        """The share that an EMA keeps of itself in update number `updates`, counted from 1."""
        if label in self.gammas:
            return power_decay(updates, self.gammas[label])
        return min(self.decays[label], updates / (9 + updates)) if self.warm_start else self.decays[label]

    # -- keeping

    def prepare(self, pl_module: LightningModule) -> None:
        """Find the tensors to average, and start from them or from the checkpoint. May be called again."""
        if not self._sources:
            self._sources = _network_tensors(_network(pl_module))
            if not self._sources:
                raise UserError("the network has no trainable parameters: an EMA has nothing to average")
        if not self.averages:
            now = {n: local_part(p.detach()) for n, p in self._sources.items()}
            wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in now.items()}
            self.averages = {label: {n: p.to(wide[n], copy=True) for n, p in now.items()} for label in self.labels}
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None

    @torch.no_grad()
    def update(self) -> None:
        """Update all EMAs with the current weights; the hooks do so once per optimizer step."""
        sources = [local_part(p.detach()) for p in self._sources.values()]
        for label in self.labels:
            self.updates[label] += 1
            weight = 1 - self.decay(label, self.updates[label])
            targets = list(self.averages[label].values())
            for low in range(0, len(targets), 128):  # bounds the memory of the widened copies
                wide = [s.to(t.dtype) for s, t in zip(sources[low : low + 128], targets[low : low + 128], strict=True)]
                torch._foreach_lerp_(targets[low : low + 128], wide, weight)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.prepare(pl_module)
        if trainer.is_global_zero and self.stds:
            moved = set_aside(self._place(trainer), self._step)
            if moved:
                rank_zero_info(
                    f"moved {moved} snapshots from after step {self._step} to {self._place(trainer) / 'stale'}"
                )

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        self.update()
        if self.stds and self._step % self.snapshot_every == 0:
            self.write_snapshots(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stds and self._step % self.snapshot_every and self.updates[next(iter(self.stds))]:
            self.write_snapshots(trainer)

    # -- using

    @contextmanager
    def averaged(self, pl_module: LightningModule, label: str | None = None) -> Iterator[None]:
        """Put an EMA, the first by default, into the network for the length of the block, and its own weights back.

        The tensors keep their identity and memory, so that compiled blocks, optimizers and shards are not affected.
        This costs one copy of the averaged tensors. Blocks may be nested.
        """
        label = self._known(label)
        if label == self._inside:  # it is there already
            yield
            return
        self.prepare(pl_module)
        reshard(_network(pl_module))
        places = [local_part(p.detach()) for p in self._sources.values()]
        with torch.no_grad():
            kept = [p.clone() for p in places]
        outer = self._inside, self._raw
        self._inside, self._raw = label, self._raw or dict(zip(self._sources, kept, strict=True))
        try:
            _copy(places, list(self.averages[label].values()))
            yield
        finally:
            reshard(_network(pl_module))
            _copy(places, kept)
            self._inside, self._raw = outer

    def network_state(self, pl_module: LightningModule, label: str | None = None) -> dict[str, Tensor]:
        """The network's complete state dict with an EMA in it: on the CPU, with clean names, gathered from shards.

        Every rank must call it; under FSDP2 only rank 0 gets the tensors of shards.
        """
        self.prepare(pl_module)
        average = self._gather(self._known(label))
        rest = {clean_name(n): v for n, v in _network(pl_module).state_dict().items()}
        return {n: average[n] if n in average else whole_tensor(v, v).cpu() for n, v in rest.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate_with is not None:
            self._validation.enter_context(self.averaged(pl_module, self.validate_with))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_validation_epoch_end: the callback's runs before the module's, which would see the raw weights
        self._validation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._validation.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validation.close()

    # -- storing

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        self.prepare(pl_module)
        averages = {label: self._gather(label, move=False) for label in self.labels}
        checkpoint[CHECKPOINT_KEY] = _Stored(updates=dict(self.updates), averages=averages)
        state = cast(dict[str, Tensor], checkpoint["state_dict"])
        for key in [k for k in state if k.startswith("network.")] if self._raw else []:
            # saved inside `averaged`: the checkpoint still gets the weights themselves
            name = clean_name(key.removeprefix("network."))
            if name in self._raw:
                raw, source = self._raw[name], self._sources[name]
                state[key] = part_of_whole(raw, source) if is_sharded(state[key]) else whole_tensor(raw, source)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        self._loaded = cast(_Stored | None, checkpoint.get(CHECKPOINT_KEY))
        if self._loaded is None:
            rank_zero_warn("the checkpoint holds no EMA of the weights: it starts from the weights")

    @torch.no_grad()
    def _restore(self, stored: _Stored) -> None:
        for label in self.labels:
            held = stored["averages"].get(label)
            if held is None:
                _check_late_start(label, label in self.stds, stored)
                continue
            _check_shapes(label, held, self._sources)
            for name, source in self._sources.items():
                self.averages[label][name].copy_(shard_of(held[name], source))
            self.updates[label] = int(stored["updates"][label])

    def _gather(self, label: str, move: bool = True) -> dict[str, Tensor]:
        """One EMA as whole tensors; those of shards come to the CPU of rank 0, and are empty elsewhere."""
        average = self.averages[label]
        whole = {n: whole_tensor(average[n], p) for n, p in self._sources.items()}
        return {n: v.cpu() for n, v in whole.items()} if move else whole

    def write_snapshots(self, trainer: Trainer) -> None:
        """Write the power-function EMAs to safetensors files. Every rank must call it; rank 0 writes."""
        for label, std in self.stds.items():
            tensors = {n: v.to(self.snapshot_dtype).contiguous() for n, v in self._gather(label).items()}
            if trainer.is_global_zero:
                path = snapshot_file(self._place(trainer), label, self._step)
                snapshot = Snapshot(path, self.updates[label], std, self._step)
                write_or_warn(path, partial(write_snapshot, snapshot, label, tensors))

    def _place(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir) / "averages"


def _check_shapes(label: str, held: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name in sorted({*held, *sources}):
        there, here = (tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (held, sources))
        if there != here:
            raise UserError(
                f"the EMA {label} of the checkpoint does not fit this network: {name!r} has shape {there} there and "
                f"{here} here; is it of another architecture, or were other parameters frozen?"
            )


def _check_late_start(label: str, power: bool, stored: _Stored) -> None:
    others = [v for k, v in stored["updates"].items() if k.startswith("power_")]
    if power and any(others):
        raise UserError(
            f"{label} was not kept from the start of this run, so it cannot begin now: leave its width out of "
            "`stds`; `diffzoo ema reconstruct` makes it from the others"
        )
    rank_zero_warn(f"the checkpoint holds no EMA {label}: it starts from the weights")


def _network(pl_module: LightningModule) -> nn.Module:
    network = pl_module.network
    assert isinstance(network, nn.Module)
    return network


def _network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes and checkpoints save, by clean name."""
    reshard(network)
    saved = network.state_dict(keep_vars=True).keys()
    found = {clean_name(n): p for n, p in network.named_parameters() if p.requires_grad}
    floating = {clean_name(n): b for n, b in network.named_buffers() if n in saved and b.is_floating_point()}
    return found | floating


@torch.no_grad()
def _copy(places: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(places, values)  # one call, which a Python signal handler cannot interrupt
