"""What `diffzoo fit --dry-run` evaluates: whether the real run will get through, not how good it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only

from diffzoo.errors import UserError
from diffzoo.evaluation.reference import make_reference
from diffzoo.evaluation.run import load_networks
from diffzoo.training.held_out import MemorisationReport
from diffzoo.training.image_metrics import ImageMetrics
from diffzoo.training.previews import SampleGrid

__all__ = ["FewSamplerSteps", "TrialEvaluation"]


class FewSamplerSteps(L.Callback):
    """Lets whatever draws in a trial draw few images in few sampler steps: memory is that of the run, time is not.

    Args:
        n: images per evaluation, at most.
        steps: of every sampler, at most.
    """

    def __init__(self, n: int = 64, steps: int = 4):
        self.n, self.steps = n, steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        try:
            fewer = replace(module.sampler, steps=min(module.sampler.steps, self.steps))
            fewer.times(module.process)
        except UserError:  # a solver or a grid of a fixed number of steps
            return
        module.sampler = fewer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleGrid) and callback.final_steps is not None:
                callback.final_steps = min(callback.final_steps, self.steps)
            if isinstance(callback, ImageMetrics):
                callback.n = min(callback.n, self.n)
                callback.steps = None if callback.steps is None else min(callback.steps, self.steps)


class TrialEvaluation(FewSamplerSteps):
    """At the end of training, draws and measures a few images as evaluation would, and prints the values.

    The recipe's own `ImageMetrics` are called, so that missing weights of feature networks or references show here;
    without any, the distance of fixed random features to the first training pictures is taken.

    Args:
        n: images per evaluation, at most.
        steps: of every sampler, at most.
        batch_size: images at a time, where the recipe says nothing.
    """

    def __init__(self, n: int = 64, steps: int = 4, batch_size: int = 32):
        super().__init__(n, steps)
        self.batch_size = batch_size

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values: dict[str, float] = {}
        for metrics in self._metrics(trainer):
            kept, metrics.n = metrics.n, self.n
            values |= metrics.measure(trainer, pl_module)
            metrics.n = kept
        if not values:
            values = self._distance(trainer, pl_module)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no metric, the data has latents"
        module: Any = pl_module
        steps = module.sampler.steps
        rank_zero_only(print)(f"dry run: {self.n} images drawn in {steps} sampler steps and measured: {shown}")

    @staticmethod
    def _metrics(trainer: Any) -> list[ImageMetrics]:
        own = [c for c in trainer.callbacks if isinstance(c, ImageMetrics) and not isinstance(c, MemorisationReport)]
        return [c for c in own if c.reference]

    def _distance(self, trainer: Any, module: Any) -> dict[str, float]:
        options: dict[str, Any] = {"every_n_steps": 0, "n": self.n, "batch_size": self.batch_size}
        metric = "frechet:random-conv"
        path = Path(trainer.default_root_dir) / "trial.npz"
        made = trainer.is_global_zero and self._reference(trainer.datamodule, metric, path)
        made = trainer.strategy.broadcast(made)  # all take the same way: each draws its share
        if not made:  # pictures are drawn and decoded all the same
            report = MemorisationReport("random-conv", self.n, batch_size=self.batch_size)
            report.sample(trainer, module)
            return {}
        return ImageMetrics(str(path), [metric], **options).measure(trainer, module)

    def _reference(self, data: Any, metric: str, path: Path) -> bool:
        """Statistics of the first training pictures; whether there are any."""
        if not hasattr(data, "one_pass"):
            return False
        batches = data.one_pass("train", min(self.n, 64))
        first = next(iter(batches))
        if "image" not in first:
            return False
        networks = list(load_networks([metric]).values())
        make_reference([first] if len(first["image"]) > 1 else batches, networks, path, keep=0)
        return True
