"""FID and its relatives during training, on the EMA weights, with every rank at work."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.evaluation.checks import require_layer
from diffzoo.evaluation.measure import metric_of
from diffzoo.evaluation.reference import Reference
from diffzoo.evaluation.run import load_networks
from diffzoo.generation import PlannedImages, SamplePlan
from diffzoo.images import Rounding, to_uint8
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.metrics.in_training import FrechetDistance, InceptionScore
from diffzoo.sampling import Guidance
from diffzoo.training.previews import sampling_from
from diffzoo.training.steps import StepCallback, data_of, ended

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["ImageMetrics", "SamplingCallback"]

ADDITIVE = ("frechet", "frechet-spatial", "inception-score")


class SamplingCallback(L.Callback):
    """What callbacks share that sample images from the EMA weights during training.

    Args:
        n: how many images.
        steps: of the sampler; None = the module's.
        guidance: classifier-free guidance scale; 1 = none.
        batch_size: images at a time.
        average: label of the EMA; None = the first.
        rounding: from floats to pixels.
    """

    def __init__(
        self, n: int, steps: int | None, guidance: float, batch_size: int, average: str | None, rounding: Rounding
    ):
        if n < 2 or batch_size < 1:
            name = type(self).__name__
            raise UserError(f"{name} needs n of at least 2 and batches of at least 1, got {n} and {batch_size}")
        self.n, self.steps, self.guidance, self.batch_size = n, steps, guidance, batch_size
        self.average, self.rounding = average, rounding

    @contextmanager
    def planned(self, trainer: L.Trainer, module: "DiffusionModule") -> Iterator[PlannedImages]:
        """The images of the module, with EMA weights for the length of the block."""
        config = module.network.config
        sampler = module.sampler if self.steps is None else replace(module.sampler, steps=self.steps)
        captions: list[str] = []
        if module.text_encoder is not None:  # the held-out ones, repeated
            held_out = [c for batch in data_of(trainer).val_dataloader() for c in batch["caption"]]
            captions = [held_out[i % len(held_out)] for i in range(self.n)]
        plan = SamplePlan(
            model="in training",
            sampler=sampler,
            guidance=Guidance(self.guidance) if self.guidance != 1 else None,
            labels="captions" if captions else "balanced" if config.num_classes else "none",
            classes=tuple(range(len(module.class_names))) or None if config.num_classes else None,
            images_per_batch=self.batch_size,
        )
        with sampling_from(module, self.average) as generator:
            yield PlannedImages(generator, plan, captions)


class ImageMetrics(SamplingCallback, StepCallback):
    """Samples images at intervals and logs `eval/<metric>`, for example `eval/fid`.

    Every rank samples its share of the same seeds. Only sums are kept, so that memory does not grow with `n` and the
    values do not depend on the number of ranks beyond rounding. They agree with `diffzoo eval` under an equal plan,
    except for the Inception Score, which is computed here as one split. Metrics of nearest neighbours need all
    features at once: run `diffzoo eval` on a checkpoint for them.

    Args:
        reference: `.npz` file of the real images (`diffzoo data stats` makes one).
        metrics: names such as "fid", "sfid", "is", "fdd", or "frechet:random-conv".
        every_n_steps: interval in optimizer steps; 0 = at the end of training only.
        n: images per evaluation. The bias of FID depends on it: values of 5,000 images lie above those of 50,000.
        steps: of the sampler; None = the module's.
        guidance: classifier-free guidance scale; 1 = none.
        batch_size: images at a time, on each rank.
        average: label of the EMA; None = the first.
        weights: paths of feature weights by network name.
        rounding: "round" or "truncate", from floats to pixels.
    """

    def __init__(
        self,
        reference: str,
        metrics: Sequence[str] = ("fid",),
        every_n_steps: int = 10_000,
        n: int = 5_000,
        steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int = 50,
        average: str | None = None,
        weights: dict[str, str] | None = None,
        rounding: Rounding = "round",
    ):
        for name in metrics:
            if metric_of(name).kind not in ADDITIVE:
                raise UserError(
                    f"{name} needs the features of all images at once and does not run during training: "
                    "use `diffzoo eval` on a checkpoint"
                )
        super().__init__(n, steps, guidance, batch_size, average, rounding)
        self.reference, self.metrics, self.every_n_steps = reference, tuple(metrics), every_n_steps
        self.weights = weights
        self._opened: Reference | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the reference before training starts, not after the first interval."""
        if stage == "fit":
            self._opened = Reference.open(self.reference)

    def after_step(self, trainer: L.Trainer, module: "DiffusionModule") -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            values = self.measure(trainer, module)
            module.log_dict({f"eval/{k}": v for k, v in values.items()}, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.every_n_steps and ended(trainer):
            values = self.measure(trainer, cast("DiffusionModule", pl_module))
            for logger in trainer.loggers:
                logger.log_metrics({f"eval/{k}": v for k, v in values.items()}, trainer.global_step)

    def measure(self, trainer: L.Trainer, module: "DiffusionModule") -> dict[str, float]:
        """The values now; every rank must call it, and every rank gets the same."""
        device = str(module.device)
        networks = load_networks(self.metrics, self.weights, device)
        reference = self._opened or Reference.open(self.reference)
        states = {name: _state(name, networks, reference).to(device) for name in self.metrics}
        for pixels in self._images(trainer, module):
            with torch.no_grad():
                layers = {name: network(pixels) for name, network in networks.items()}
            for name, state in states.items():
                metric = metric_of(name)
                state.update(layers[metric.network][metric.layer])
        return {name: float(state.compute()) for name, state in states.items()}

    def _images(self, trainer: L.Trainer, module: "DiffusionModule") -> Iterator[Tensor]:
        """This rank's share of the images, as raw pixels."""
        starts = range(0, self.n, self.batch_size)
        world, rank = trainer.world_size, trainer.global_rank
        with self.planned(trainer, module) as planned:
            # a sharded network communicates in its forward pass: all ranks take equally many turns, some for nothing
            for turn in range(-(-len(starts) // world)):
                index = turn * world + rank
                start = starts[min(index, len(starts) - 1)]
                images = planned.images(start, min(self.batch_size, self.n - start))
                if index < len(starts):
                    yield to_uint8(images, self.rounding, start)


def _state(name: str, networks: Mapping[str, FeatureNetwork], reference: Reference) -> InceptionScore | FrechetDistance:
    metric = metric_of(name)
    network = networks[metric.network]
    require_layer(metric, network)
    if metric.kind == "inception-score":
        return InceptionScore(network.dims[metric.layer])
    return FrechetDistance(*reference.statistics(network, metric.layer))
