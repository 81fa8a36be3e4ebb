"""A verdict on the samples at the end of training, measured against the training images."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.images import to_uint8
from diffzoo.metrics.features import load_features
from diffzoo.metrics.frechet import FrechetReference
from diffzoo.metrics.moments import Moments
from diffzoo.training.previews import sampling_from
from diffzoo.training.steps import ended, say
from diffzoo.typing import Condition, Features, RawPixels

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

__all__ = ["GridVerdict", "Verdict", "compare"]

COARSE = 4  # downscaling of the images that stand for coarse samples
NEIGHBOURS = 4  # images to compare with, per sample


class GridVerdict(L.Callback):
    """After training, says whether the samples are finished or still blobs of colour.

    Samples are made with the labels of `n` training images and compared with those that were seen after them, by the
    spatial features of a random network. They are finished if

    - their Fréchet distance is no larger than that of the `n` images themselves at a quarter of their resolution: 8 of
      32 pixels show what is where, but no detail;
    - the five nearest training images agree with their label at least half as often above chance as for the `n` images.

    The numbers are not comparable with those of other protocols.

    Args:
        n: images.

    Raises:
        UserError: for fewer than two images.
    """

    def __init__(self, n: int = 200):
        if n < 2:
            raise UserError(f"GridVerdict compares at least 2 images, got n={n}")
        self.n = n
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if not isinstance(batch, dict) or sum(map(len, self._images)) >= (1 + NEIGHBOURS) * self.n:
            return
        image = batch.get("image")
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[1] in (1, 3):
            self._images.append(image.cpu())
            self._labels.append(batch["label"].cpu() if "label" in batch else torch.zeros(len(image), dtype=torch.long))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if ended(trainer) and trainer.world_size == 1 and sum(map(len, self._images)) >= 4:
            step, found = trainer.global_step, self.measure(cast("DiffusionModule", pl_module))
            for logger in trainer.loggers:
                logger.log_metrics({f"verdict/{k}": v for k, v in asdict(found).items()}, step)
            more = f"the samples are not finished: train longer, for example with --steps {max(2 * step, 1500)}"
            say(f"{found}: {'the samples are recognisable' if found.finished else more}")

    def measure(self, module: "DiffusionModule") -> "Verdict":
        """Sample and compare."""
        known, labels = torch.cat(self._images), torch.cat(self._labels)
        n = min(self.n, len(known) // 2)
        with sampling_from(module) as generator:
            classes = generator.kind == "class"
            sampled = generator.images(
                range(n),
                Condition(label=labels[:n]) if classes else None,
                sampler=module.sampler,
                guidance=module.guidance if classes else None,
                batch_size=50,
            )
        return compare(to_uint8(sampled), known[:n], known[n:], labels)


@dataclass(frozen=True)
class Verdict:
    """Samples, and the training images whose labels they have, against other training images.

    distance, coarse: Fréchet distances of the samples, and of the images at a quarter of their resolution.
    right, real, chance: share whose label the nearest images have: of the samples, of the images, by chance.
    """

    distance: float
    coarse: float
    right: float
    real: float
    chance: float

    @property
    def finished(self) -> bool:
        """Whether the samples are finished."""
        return self.distance <= self.coarse and self.right >= (self.chance + self.real) / 2

    def __str__(self) -> str:
        classes = f"; class recognised in {self.right:.0%} of the samples, {self.real:.0%} of real images, by chance "
        classes = f"{classes}{self.chance:.0%}" if self.chance < 1 else ""
        return f"Fréchet distance {self.distance:.2g}, of coarse real images {self.coarse:.2g}{classes}"


def compare(
    sampled: RawPixels, first: RawPixels, others: UInt8[Tensor, "n c h w"], labels: Int[Tensor, "b+n"]
) -> Verdict:
    """The verdict on samples with the labels of `first`; `labels` are those of `first`, then of `others`."""
    network = load_features("random-conv")

    def features(pixels: RawPixels) -> Features:
        return torch.cat([network(part)["spatial"] for part in pixels.split(200)])

    real, known = features(first), features(others)
    moments = Moments.of(known)
    target = FrechetReference.of(moments.mean, moments.covariance())
    made = features(sampled)

    def right(queries: Features) -> float:
        near = torch.cdist(queries, known).topk(min(5, len(known)), largest=False).indices
        return float((labels[len(first) :][near].mode(1).values == labels[: len(first)]).float().mean())

    return Verdict(
        target.distance_of(Moments.of(made)),
        target.distance_of(Moments.of(features(coarsened(first)))),
        right(made),
        right(real),
        1 / len(labels.unique()),
    )


def coarsened(pixels: RawPixels) -> RawPixels:
    """Images at a part of their resolution, enlarged again."""
    h, w = pixels.shape[-2:]
    small = F.interpolate(pixels.float(), size=(max(1, h // COARSE), max(1, w // COARSE)), mode="area")
    return to_uint8(F.interpolate(small, size=(h, w), mode="bilinear") / 127.5 - 1)
