"""Whether the samples at the end of training show anything, measured against the images that they were trained on."""

from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.images import to_uint8
from diffzoo.metrics.features import load_features
from diffzoo.metrics.frechet import FrechetReference
from diffzoo.metrics.moments import Moments
from diffzoo.training.previews import sampling_from
from diffzoo.typing import Condition, RawPixels

__all__ = ["GridVerdict"]

COARSE = 4  # the yardstick is the training images at this part of their resolution
_say = rank_zero_only(print)  # on the command line Lightning's own remarks are hidden


class GridVerdict(L.Callback):
    """After training, says whether samples come as near to the training images as a coarse copy of these does.

    Samples with the labels of the first `n` training images are compared with the next `n`, by the Fréchet distance of
    random features. The yardstick is the distance of the first ones at a quarter of their resolution, where 32 pixels
    still tell their classes and 8 do not: samples beyond it are blobs of colour. The two numbers mean nothing
    elsewhere.

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

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, dict) or sum(map(len, self._images)) >= 2 * self.n:
            return
        image = batch.get("image")
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[1] in (1, 3):
            self._images.append(image.cpu())
            self._labels.append(batch.get("label", torch.zeros(0, dtype=torch.long)).cpu())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False) or trainer.interrupted or trainer.world_size > 1:
            return
        if sum(map(len, self._images)) < 4:
            return
        distance, coarse = self.measure(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({"eval/verdict": distance, "eval/verdict_coarse": coarse}, trainer.global_step)
        found = f"distance of the samples to training images {distance:.2g}, of these at a quarter of their resolution"
        _say(f"{found} {coarse:.2g}: {self.advice(trainer.global_step, distance <= coarse)}")

    @staticmethod
    def advice(steps: int, good: bool) -> str:
        """What the verdict means."""
        if good:
            return "the samples show what they were trained on"
        return f"the samples are not finished, train longer, for example with --steps {max(2 * steps, 1500)}"

    def measure(self, module: Any) -> tuple[float, float]:
        """The distances of the samples and of the coarse images."""
        known, labels = torch.cat(self._images), torch.cat(self._labels)
        n = min(self.n, len(known) // 2)
        first, other = known[:n], known[n : 2 * n]
        with sampling_from(module) as generator:
            sampled = generator.images(
                range(n),
                Condition(label=labels[:n]) if generator.kind == "class" else None,
                sampler=module.sampler,
                guidance=module.guidance if generator.kind == "class" else None,
                batch_size=50,
            )
        network = load_features("random-conv")

        def moments(pixels: Tensor) -> Moments:
            return Moments.of(network(pixels)["pool"])

        reference = moments(other)
        target = FrechetReference.of(reference.mean, reference.covariance())
        return target.distance_of(moments(to_uint8(sampled))), target.distance_of(moments(coarsened(first)))


def coarsened(pixels: RawPixels) -> RawPixels:
    """Images at a part of their resolution, enlarged again."""
    h, w = pixels.shape[-2:]
    small = F.interpolate(pixels.float(), size=(max(1, h // COARSE), max(1, w // COARSE)), mode="area")
    return to_uint8(F.interpolate(small, size=(h, w), mode="bilinear") / 127.5 - 1)
