"""The base of all data modules: common settings and the loaders; see `position` for the exact resume."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from diffzoo.data.bad_images import note_bad
from diffzoo.data.batches import BatchMaker, RawBatch, Transform
from diffzoo.data.position import PositionedData
from diffzoo.data.reading import Reading, check_positive, range_of_source
from diffzoo.data.sources import Source, unlabelled
from diffzoo.data.spans import EvalBatches, EvalSpans, Sequential, Spans, micro_batches
from diffzoo.data.workers import WorkerLoader, auto_workers
from diffzoo.errors import UserError, lacks
from diffzoo.sizes import Size, as_size, sides

__all__ = ["ImageDataModule"]

CACHE_BYTES = 512 * 2**20  # decoded training sets up to this size are kept in memory


class ImageDataModule(PositionedData):
    """Base of all data modules; subclasses say where rows come from by `open_source`.

    Args:
        image_size: height and width in pixels: a number for squares, else [h, w]. Images are scaled to just cover them.
        batch_size: GLOBAL batch of one optimizer step; each rank takes batch_size / ranks of it.
        micro_batch_size: how many images one device takes at once; None: its whole share. `diffzoo fit` accumulates
            gradients over the micro-batches of a step, so this changes memory and speed, never the result.
        num_workers: decoding processes per rank; None chooses by cores (none for sets that are cached).
        seed: of order, crops, flips and captions.
        flip: mirror half of the training images.
        balance: show every class equally often. For sources with random access.
        buckets: heights and widths to train on, such as [64, [80, 48], [48, 80]], best of about as many pixels as
            `image_size`. Each image goes to the nearest aspect, each batch has one shape; see `diffzoo.data.buckets`.
            Held-out images keep `image_size`.
        cache: keep decoded images in memory; None: if centre crops of the training set take less than 512 MiB.
        channels: of the images: 1 grey, 3 RGB, 4 RGB with transparency; more are bands of TIFF and NPY files.
        **reading: see `Reading`.
    """

    batch_maker: type[BatchMaker] = BatchMaker

    def __init__(
        self,
        image_size: Size = 64,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        flip: bool = True,
        balance: bool = False,
        buckets: list[Size] | None = None,
        cache: bool | None = None,
        channels: int = 3,
        **reading: Any,
    ):
        r = Reading(**reading)
        check_positive({"batch_size": batch_size, "channels": channels, "micro_batch_size": micro_batch_size or 1})
        sizes, size = tuple(as_size(size, "buckets") for size in buckets or ()), as_size(image_size)
        if sizes and balance:
            raise UserError("balance and buckets both decide which image comes next: leave one out")
        transform = Transform(size, r.resize, r.crop, flip, r.fast_jpeg, seed, channels, r.value_range)
        super().__init__(batch_size, balance, sizes, r, transform)
        self.image_size, self.micro_batch_size = size, micro_batch_size
        self.bad_held_out: dict[int, str] = {}
        self._num_workers, self._cache = num_workers, cache

    # ---- what subclasses say

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        """The rows of a part; None if there is no such part."""
        raise lacks(self, "open_source")

    # ---- what others ask

    @cached_property
    def train_source(self) -> Source:
        """The training rows."""
        source = self.open_source("train")
        if source is None or not len(source):
            name = type(self).__name__ if source is None else source.name
            raise UserError(f"no images are left to train on in {name}")
        if self.transform.value_range is None:
            self.transform = dataclasses.replace(self.transform, value_range=range_of_source(source))
        return source

    @cached_property
    def val_source(self) -> Source | None:
        """The held-out rows, or None."""
        source = self.open_source("validation")
        return source if source is not None and len(source) else None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty for data without labels."""
        return list(self.train_source.class_names)

    @property
    def num_classes(self) -> int:
        """How many classes the labels have; 0 for data without labels."""
        return len(self.train_source.class_names)

    @property
    def has_captions(self) -> bool:
        """Whether batches have captions."""
        return self.train_source.has_captions

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per trainer epoch: the whole number nearest to one pass. The stream runs on across its end."""
        return max(1, round(len(self.train_source) / self.batch_size))

    @property
    def accumulate(self) -> int:
        """Micro-batches that each rank takes per global batch."""
        return self.micro_batches(self._ranks()[1])

    def micro_batches(self, world: int) -> int:
        """Micro-batches that each of `world` ranks takes per global batch; see `spans.micro_batches`."""
        return micro_batches(self.batch_size, self.micro_batch_size, world)

    @property
    def cached(self) -> bool:
        """Whether decoded training images are kept in memory."""
        if self._cache is not None:
            return self._cache and self.transform.crop == "center"
        size = len(self.train_source) * self.transform.channels * math.prod(sides(self.image_size))
        return self.transform.crop == "center" and self.train_source.random_access and size <= CACHE_BYTES

    @property
    def num_workers(self) -> int:
        """Decoding processes per rank."""
        return auto_workers(self.cached, self._ranks()[1]) if self._num_workers is None else self._num_workers

    # ---- loaders

    def prepare_data(self) -> None:
        """Read and cache the index of the source, on one process before the others need it."""
        _ = self.train_source, self.val_source
        if self.train_source.class_names and not self.train_source.remote:
            _warn_of_empty_classes(self.train_source)

    def train_dataloader(self) -> "TrainBatches":
        """Batches from the present position on; see `TrainBatches`."""
        accumulate, trainer = self.accumulate, self.trainer
        if accumulate > 1 and trainer is not None and trainer.accumulate_grad_batches != accumulate:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} makes {accumulate} micro-batches of each step, but the "
                f"trainer accumulates {trainer.accumulate_grad_batches}: leave accumulate_grad_batches out for "
                f"`diffzoo fit`, or pass {accumulate} to your own Trainer"
            )
        rank, world = self._ranks()
        if not rank and not self.balance:
            _warn_of_copies(self.train_source, world * max(1, self.num_workers), self.reading.shuffle_window)
        self._loader = TrainBatches(self)
        return self._loader

    def val_dataloader(self) -> "EvalBatches | list[RawBatch]":
        """The held-out rows, each once over all ranks; an empty list if there are none.

        Raises:
            UserError: if there are none, and validation is all that the trainer is to do.
        """
        if self.val_source is None:
            if self.trainer is not None and self.trainer.state.fn == "validate":
                raise self._nothing_held_out()
            return self._no_batches()
        spans = EvalSpans(len(self.val_source), self.batch_size, *self._ranks())
        if not len(spans):
            warnings.warn(
                f"nothing is validated: {self.val_source.name} holds {len(self.val_source)} images out, fewer than "
                f"the {spans.world} ranks"
            )
            return self._no_batches()
        return self._each_once(self.val_source, spans, self.bad_held_out)

    def _nothing_held_out(self) -> UserError:
        return UserError(f"{self.train_source.name} holds no images out: set val_path or val_fraction of the data")

    def _no_batches(self) -> list[RawBatch]:
        # an empty list is Lightning's only way to have no validation, and it warns of it
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return []

    def _each_once(self, source: Source, spans: EvalSpans, bad: dict[int, str]) -> EvalBatches:
        _ = self.train_source  # the value range of the training images is that of the held-out ones too
        on_bad = "leave out" if self.reading.on_bad_image == "skip" else self.reading.on_bad_image
        make = self.batch_maker(source, Sequential(source), self.transform.held_out(), on_bad, cache=False)
        return EvalBatches(make, spans, min(self.num_workers, 4), bad, self.reading.max_bad)

    def one_pass(self, part: Literal["train", "validation"], batch_size: int = 64) -> EvalBatches:
        """Every row of a part once, in order and unaugmented, all of them for this process. Bad images are left out.

        Raises:
            UserError: if the data holds no rows out.
        """
        source = self.train_source if part == "train" else self.val_source
        if source is None:
            raise self._nothing_held_out()
        bad = self.bad_images if part == "train" else self.bad_held_out
        return self._each_once(source, EvalSpans(len(source), batch_size, 0, 1), bad)

    def teardown(self, stage: str | None = None) -> None:
        """End the workers."""
        if self._loader is not None:
            self.set_position(self.images_seen)

    def on_exception(self, exception: BaseException) -> None:
        """End the workers when a run is cut short, after its checkpoint has been written."""
        self.teardown()

    # ---- called by the loader

    def take(self, batch: RawBatch) -> RawBatch:
        """Count a batch that is handed to the trainer, and report the images that were skipped in it."""
        note_bad(self.bad_images, batch.pop("bad"), self.reading.max_bad, self.train_source.name, "skipped")
        self.position.taken += 1
        return batch

    def make_worker_loader(self, position: int) -> WorkerLoader:
        """Endless batches of this rank from a position on."""
        make = self.batch_maker(self.train_source, self.order, self.transform, self.reading.on_bad_image, self.cached)
        spans = Spans(position, self.batch_size, *self._ranks(), self.accumulate)
        return WorkerLoader(make, spans, self.num_workers)


class TrainBatches:
    """The training loader: each pass gives the micro-batches of `steps_per_epoch` steps from where training is.

    Workers live on from one pass to the next. Its length is that of a whole epoch also after a resume in mid-epoch,
    because Lightning adds the batches done before to those it fetches.
    """

    def __init__(self, data: ImageDataModule):
        self._data = data
        self._workers: WorkerLoader | None = None
        self._next = (-1, 0)

    def __len__(self) -> int:
        return self._data.steps_per_epoch * self._data.accumulate

    def __iter__(self) -> Iterator[RawBatch]:
        begun, parts = self._data.begin(), self._data.accumulate
        for _ in range(len(self)):
            steps, part = divmod(begun.taken, parts)
            position = begun.anchor + steps * self._data.batch_size
            if self._workers is None or self._next != (position, part):
                self.close()
                self._workers = self._data.make_worker_loader(position)  # a position is always that of a whole step
            batch = next(self._workers)
            self._next = (position, part + 1) if part + 1 < parts else (position + self._data.batch_size, 0)
            yield self._data.take(batch)

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def state_dict(self) -> dict[str, object]:
        """Save nothing: the data module holds the position. Lightning takes a loader with this method as resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore nothing."""


def _warn_of_empty_classes(source: Source) -> None:
    """Say which classes have no row, and if a row has no class, before training meets it."""
    labels = source.label_values(range(len(source)))
    if labels is None:  # the source does not know them without its images
        return
    if None in labels:
        warnings.warn(str(unlabelled(source.row_name(labels.index(None)), source.name)))
    present = {*labels}
    empty = [name for label, name in enumerate(source.class_names) if label not in present]
    if empty:
        said = ", ".join(map(str, empty[:8])) + ", ..." * (len(empty) > 8)
        classes = len(source.class_names)
        warnings.warn(f"{len(empty)} of {classes} classes of {source.name} are without a row to train on: {said}")


def _warn_of_copies(source: Source, processes: int, window: int) -> None:
    """Say that a small streamed set is fetched by every process.

    It could be cut into lanes as large ones are, but then every epoch would fetch it anew, which costs more after a
    few epochs; and lanes for several processes alone would make the order depend on their number.
    """
    if processes > 1 and source.remote and not source.random_access and len(source) <= window:
        warnings.warn(
            f"each of {processes} processes fetches and holds all {len(source)} rows of {source.name} before its "
            "first batch, because shuffle_window mixes them all: set streaming to false to fetch them once"
        )
