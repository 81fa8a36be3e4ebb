"""The position of a run in the endless sequence of samples, as a data module keeps it.

The position is one integer, `images_seen`: how many samples of the endless global sequence (see `order`) training has
consumed. It is counted by what the trainer has *finished*, never by what loaders have prefetched, and Lightning saves
it with every checkpoint; resuming continues with the next sample, on any number of ranks and workers.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from diffzoo.data.bad_images import check_bad, share_bad
from diffzoo.data.batches import Transform
from diffzoo.data.buckets import Bucketed, aspects, nearest
from diffzoo.data.order import Balanced, LaneOrder, Layout, Order, full_shuffle, lanes_for
from diffzoo.data.reading import Reading
from diffzoo.data.sources import Indices, Source
from diffzoo.errors import UserError, lacks
from diffzoo.sizes import Size, sides

__all__ = ["Position", "PositionedData"]


class Closable(Protocol):
    """A loader whose workers can be ended."""

    def close(self) -> None:
        """End the workers."""


class Position:
    """Where training is: an anchor, and the micro-batches that were handed out since.

    Attributes:
        anchor: samples of the global sequence before the first batch of this epoch.
        taken: micro-batches of this rank that were handed to the trainer since.
    """

    def __init__(self) -> None:
        self.anchor, self.taken, self._finished_before = 0, 0, 0

    def move(self, anchor: int, finished: int | None = None) -> None:
        """Go on from an anchor.

        Args:
            anchor: samples of the global sequence.
            finished: micro-batches whose training step the trainer has finished in its life; None leaves it.
        """
        self.anchor, self.taken = anchor, 0
        self._finished_before = self._finished_before if finished is None else finished

    def finished(self, progress: int | None) -> int:
        """Micro-batches since the anchor. One that was handed out but whose step was cut short does not count.

        Args:
            progress: micro-batches whose step the trainer has finished in its life; None outside a trainer.
        """
        if progress is None or not self.taken:
            return self.taken
        return min(self.taken, progress - self._finished_before)


class PositionedData(LightningDataModule):
    """A data module that knows where training is and what that means; subclasses have rows and loaders.

    Attributes:
        transform: of images; its seed is that of the order.
        bad_images: of the training rows: reasons by row.
    """

    def __init__(
        self, batch_size: int, balance: bool, buckets: tuple[Size, ...], reading: Reading, transform: Transform
    ) -> None:
        super().__init__()
        self.batch_size, self.balance, self.buckets, self.reading = batch_size, balance, buckets, reading
        self.transform, self.seed = transform, transform.seed
        self.bad_images: dict[int, str] = {}
        self.position = Position()
        self._layout: Layout | None = None
        self._loader: Closable | None = None

    @cached_property
    def train_source(self) -> Source:
        """The training rows."""
        raise lacks(self, "train_source")

    @property
    def accumulate(self) -> int:
        """Micro-batches that each rank takes per global batch."""
        raise lacks(self, "accumulate")

    @property
    def images_seen(self) -> int:
        """Samples of the global sequence that training has finished with."""
        finished = self.position.finished(self._progress())
        return self.position.anchor + finished // self.accumulate * self.batch_size

    def set_position(self, images_seen: int) -> None:
        """Continue after this many samples."""
        if images_seen < 0:
            raise UserError(f"images_seen is at least 0, got {images_seen}")
        if self.buckets and images_seen % self.batch_size:
            raise UserError(
                f"with buckets, images_seen is a multiple of batch_size {self.batch_size}, got {images_seen}"
            )
        self.position.move(images_seen)
        if self._loader is not None:
            self._loader.close()

    def _progress(self) -> int | None:
        """Batches whose training step the trainer has finished in its life; None outside a trainer."""
        trainer = self.trainer
        if trainer is None or not (trainer.training or trainer.validating):
            return None
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def begin(self) -> Position:
        """The position, fixed where a trainer asks for the first batch of an epoch; ranks share what they know."""
        again = getattr(self.trainer, "overfit_batches", 0)  # every epoch has the first few batches
        self.position.move(0 if again else self.images_seen, self._progress() or 0)
        if self.trainer is not None and self.trainer.training and self._ranks()[1] > 1:
            share_bad(self.bad_images, self._ranks()[1])
            check_bad(self.bad_images, self.reading.max_bad, self.train_source.name)
        return self.position

    def state_dict(self) -> dict[str, Any]:
        """The position, what gives it meaning, and the images that were found bad on the way."""
        return {
            "images_seen": self.images_seen,
            "order": self.order.state(),
            "source": self.train_source.rows_hash,
            "bad_images": dict(self.bad_images),
            **({"value_range": self.transform.value_range} if self.transform.value_range else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, in the order and with the crops, flips and captions of its seed.

        Raises:
            UserError: the rows are not those of the checkpoint, or `balance` is not.
        """
        changed = state_dict["source"] != self.train_source.rows_hash
        if changed and not self.reading.allow_changed_source:
            raise UserError(
                f"{self.train_source.name} is no longer what the checkpoint was trained on (other rows or another "
                "revision), so its position has no meaning here: restore the data, pin its revision, or set "
                "allow_changed_source to go on regardless"
            )
        order = dict(state_dict["order"])
        kind = order.pop("kind")
        self._check_kind(kind, order)
        if order["seed"] != self.seed:
            warnings.warn(f"the order, crops and flips of the data keep the seed {order['seed']} of the checkpoint")
            self.seed = order["seed"]
            self.transform = dataclasses.replace(self.transform, seed=self.seed)
        if state_dict.get("value_range") and not changed:
            self.transform = dataclasses.replace(self.transform, value_range=tuple(state_dict["value_range"]))
        self._layout = Layout(**order) if kind == "lanes" and not changed else None
        self.__dict__.pop("order", None)
        bad = {} if changed else state_dict.get("bad_images", {})
        self.bad_images = {int(row): reason for row, reason in bad.items()}
        self.set_position(int(state_dict["images_seen"]))

    @cached_property
    def order(self) -> Order:
        """Which row the stream shows at which position."""
        source = self.train_source
        if self.balance:
            labels = source.labels()
            if labels is None or not source.random_access:
                raise UserError(f"balance needs labels and random access, which {source.name} does not have")
            return Balanced(labels, self.seed)
        if self.buckets:
            return Bucketed(self.bucket_of(source), self.buckets, self.seed, self.batch_size)
        if self._layout is None:
            whole = source.random_access or len(source) <= self.reading.shuffle_window
            cut = self.reading.lanes, self.reading.shuffle_window
            self._layout = (
                full_shuffle(self.seed, len(source)) if whole else lanes_for(self.seed, self.batch_size, *cut)
            )
        # A full shuffle does not depend on blocks: pixels and their latents come alike. What else there is follows from
        # the layout alone, so that a checkpoint goes on the same where rows are no longer streamed.
        one_block = self._layout.lanes == 1 and self._layout.window >= len(source)
        return LaneOrder(np.array([len(source)]) if one_block else source.block_sizes, self._layout)

    def bucket_of(self, source: Source) -> Indices:
        """Which of `buckets` each row belongs to, `(rows,)`."""
        return nearest(aspects(source), self.buckets)

    def _check_kind(self, kind: str, order: Mapping[str, object]) -> None:
        """Refuse a position in an order of another kind, or of other buckets."""
        ours: dict[str, object] = {"balance": self.balance, "buckets": [list(sides(s)) for s in self.buckets]}
        theirs: dict[str, object] = {"balance": kind == "balanced", "buckets": order.get("sizes", [])}
        if self.buckets and kind == "buckets":
            ours, theirs = {**ours, "batch_size": self.batch_size}, {**theirs, "batch_size": order["batch"]}
        for name, value in theirs.items():
            if value != ours[name]:
                raise UserError(
                    f"the checkpoint was trained with {name} set to {json.dumps(value)}, so its position has no "
                    f"meaning in an order with {name} set to {json.dumps(ours[name])}: set it back, or begin a new run "
                    "from the weights alone"
                )

    def _ranks(self) -> tuple[int, int]:
        """(rank, ranks)."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
