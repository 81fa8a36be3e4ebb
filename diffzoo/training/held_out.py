"""Checks on fine-tuning: the distance to held-out images, and copies of training images among the samples.

With few images the loss goes on falling while the model begins to repeat them. The Fréchet distance to images that
were held out turns before that, so training stops there and its best weights are kept.
"""

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import lightning.pytorch as L
import torch
from torch import Tensor

from diffzoo.cache import explain_disk
from diffzoo.errors import UserError
from diffzoo.evaluation.measure import metric_of
from diffzoo.evaluation.memorisation import report
from diffzoo.evaluation.reference import make_reference
from diffzoo.evaluation.run import load_networks
from diffzoo.images import Rounding, to_uint8
from diffzoo.training.image_metrics import ImageMetrics, SamplingCallback
from diffzoo.training.optional_files import write_or_warn
from diffzoo.training.steps import data_of, ended, is_trial, say

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["HeldOutDistance", "MemorisationReport"]

LIMIT_BYTES = 4 * 2**30  # of training images that a report looks at


class _OnePass(Protocol):
    """The part of `diffzoo.data.ImageDataModule` that is used here."""

    val_source: Sized

    def one_pass(self, part: Literal["train", "validation"]) -> Iterable[Mapping[str, Tensor]]: ...


class HeldOutDistance(ImageMetrics):
    """Logs `eval/<metric>` against the data's own held-out images, and stops training when it no longer falls.

    The best weights are in the run's folder `best`, in the form that `load_any`, `diffzoo sample` and `diffzoo push`
    read. Distances of small sets are biased upwards by an amount that depends on their sizes: compare them within a
    run, or between runs with equal `n` and equal held-out images.

    Args:
        metric: "fid", "fdd" or another Fréchet distance, such as "frechet:random-conv".
        every_n_steps: interval in optimizer steps, at least 1.
        patience: stop after this many measurements in a row that are no better than the best; None = never.
        min_delta: what counts as better: a distance smaller by this share of the best.
        n: images sampled per measurement; None = as many as are held out.
        steps, guidance, batch_size, average, weights, rounding: as for `ImageMetrics`.

    Raises:
        UserError: for a metric that is no Fréchet distance, or data that holds nothing out.
    """

    def __init__(
        self,
        metric: str = "fid",
        every_n_steps: int = 500,
        patience: int | None = 3,
        min_delta: float = 0.01,
        n: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int = 50,
        average: str | None = None,
        weights: dict[str, str] | None = None,
        rounding: Rounding = "round",
    ):
        more = steps, guidance, batch_size, average, weights, rounding
        super().__init__("", [metric], every_n_steps, n or 2, *more)
        if not metric_of(metric).kind.startswith("frechet"):
            raise UserError(f"HeldOutDistance stops by a Fréchet distance, which {metric} is not: use fid or fdd")
        if every_n_steps < 1 or (patience is not None and patience < 1):
            raise UserError("HeldOutDistance needs every_n_steps and patience of at least 1")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self._counts_n = n is None
        self.best, self.best_step, self.waited = float("inf"), -1, 0
        self.best_kept = True  # whether its weights could be written

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The reference is made when training starts."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._opened is not None or is_trial(trainer):
            return
        path = Path(trainer.default_root_dir) / "held_out.npz"
        if trainer.is_global_zero:
            networks = load_networks(self.metrics, self.weights, str(pl_module.device))
            with explain_disk(path):
                make_reference(_data(trainer).one_pass("validation"), list(networks.values()), path, keep=0)
        trainer.strategy.barrier("diffzoo.held_out")
        self.reference = str(path)
        super().setup(trainer, pl_module, "fit")
        if self._counts_n:
            self.n = max(2, len(_data(trainer).val_source))

    def after_step(self, trainer: L.Trainer, module: "DiffusionModule") -> None:
        step = trainer.global_step
        if step % self.every_n_steps or self._opened is None:
            return
        value = self.measure(trainer, module)[self.metric]
        for logger in trainer.loggers:  # at every measurement, whatever log_every_n_steps says
            logger.log_metrics({f"eval/{self.metric}": value}, step)
        self.judge(trainer, module, value)

    def judge(self, trainer: L.Trainer, module: "DiffusionModule", value: float) -> None:
        """Keep the weights if they are the best so far; stop if the best are too long ago."""
        step, folder = trainer.global_step, Path(trainer.default_root_dir) / "best"
        if value < self.best * (1 - self.min_delta):
            self.best, self.best_step, self.waited = value, step, 0
            self.best_kept = write_or_warn(folder, lambda: module.write_weights(folder))
            return
        self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True
            where = f"are in {folder}" if self.best_kept else "could not be written"
            say(
                f"stopped at step {step}: the held-out {self.metric} has been no better than {self.best:.4g}, that of "
                f"step {self.best_step}, for {self.waited} measurements; the weights of that step {where}"
            )

    def state_dict(self) -> dict[str, object]:
        return {k: getattr(self, k) for k in ("best", "best_step", "waited", "best_kept")}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        vars(self).update(state_dict)


class _Tensors:
    """Images in memory, as `diffzoo.evaluation.memorisation` reads them."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, start: int, count: int) -> Tensor:
        return self.pixels[start : start + count]


class MemorisationReport(SamplingCallback):
    """After training, the nearest training images of `n` sampled ones: `memorisation.png` and `.json` in the run.

    Args:
        network: feature network that distances are measured in, such as "inception-2015" or "dinov2-vitl14".
        n: how many images are sampled.
        pairs: rows of the image, closest first.
        steps, guidance, batch_size, average: as for `ImageMetrics`.
        weights: file of the feature network's weights; None = its own.
    """

    def __init__(
        self,
        network: str = "inception-2015",
        n: int = 256,
        pairs: int = 16,
        steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int = 50,
        average: str | None = None,
        weights: str | None = None,
    ):
        super().__init__(n, steps, guidance, batch_size, average, "round")
        self.network, self.pairs, self.weights = network, pairs, weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look for the feature network's weights now, not when training is done."""
        if stage == "fit" and trainer.is_global_zero:
            given = None if self.weights is None else {self.network: self.weights}
            load_networks([f"frechet:{self.network}"], given)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not ended(trainer):
            return
        sampled = self.sample(trainer, cast("DiffusionModule", pl_module))
        if not trainer.is_global_zero:
            return
        training = _Tensors(_training_images(_data(trainer)))
        folder = Path(trainer.default_root_dir)

        def write() -> None:
            found = report(
                _Tensors(sampled), training, self.network, folder,
                weights=self.weights, pairs=self.pairs, device=str(pl_module.device),
            )  # fmt: skip
            say(found.summary())

        write_or_warn(folder / "memorisation.json", write)

    def sample(self, trainer: L.Trainer, module: "DiffusionModule") -> Tensor:
        """The images, raw pixels `(n, 3, h, w)` on the CPU; every rank samples them all, as sharded networks need."""
        with self.planned(trainer, module) as planned:
            starts = range(0, self.n, self.batch_size)
            parts = [planned.images(s, min(self.batch_size, self.n - s)) for s in starts]
        return torch.cat([to_uint8(p, self.rounding) for p in parts])


def _data(trainer: L.Trainer) -> _OnePass:
    data = data_of(trainer)
    if not hasattr(data, "one_pass"):
        raise UserError(f"{type(data).__name__} cannot show its images one by one: use a data module of diffzoo")
    return cast(_OnePass, data)


def _training_images(data: _OnePass) -> Tensor:
    """The training images as raw pixels, as many as fit."""
    parts: list[Tensor] = []
    size = 0
    for batch in data.one_pass("train"):
        if "image" not in batch:
            raise UserError("a report on copies needs images, and this data has latents: run `diffzoo eval`")
        parts.append(batch["image"].cpu())
        size += parts[-1].nbytes
        if size > LIMIT_BYTES:
            say(f"the report on copies looks at the first {sum(map(len, parts))} training images alone")
            break
    return torch.cat(parts)
