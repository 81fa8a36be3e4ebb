"""`diffzoo fit --dry-run`: tries everything that a long run will need, in minutes and before it starts.

Two real steps of the recipe as it is, a preview, an evaluation on 64 images, a checkpoint, and a resume that takes one
more step.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L

from diffzoo.errors import UserError
from diffzoo.evaluation.reference import make_reference
from diffzoo.evaluation.run import load_networks
from diffzoo.recipe.train import train
from diffzoo.runs import Run, is_first_process
from diffzoo.training.held_out import MemorisationReport
from diffzoo.training.image_metrics import ImageMetrics, SamplingCallback
from diffzoo.training.previews import SampleGrid
from diffzoo.training.steps import data_of, say

if TYPE_CHECKING:
    from diffzoo.data import ImageDataModule
    from diffzoo.training.module import DiffusionModule

__all__ = ["FewSamplerSteps", "TrialEvaluation", "dry_run"]

EVALUATION = "--trainer.callbacks+=diffzoo.recipe.dry_run.TrialEvaluation"
FEW_STEPS = "--trainer.callbacks+=diffzoo.recipe.dry_run.FewSamplerSteps"
FOLDER = "DIFFZOO_DRY_RUN"  # tells the processes that Lightning launches where the first one works

IMAGES, BATCH, STEPS = 64, 32, 4  # of an evaluation; sampler steps


def dry_run(recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> int:
    """Run the recipe for two steps in a temporary directory, then resume it for a third; nothing is kept."""
    with _common_folder() as place:
        directory = place / "run"
        limits = ["--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
        trainer = train(recipes, [*rest, *limits, EVALUATION, "--trainer.max_steps=2"], directory, folder=folder)
        if trainer.is_global_zero:
            pictures = sorted(p.name for p in Run(directory).samples.glob("*.png"))
            print(f"dry run: two steps done, previews: {', '.join(pictures) or 'none in this recipe'}")
        limits.append("--trainer.max_steps=3")
        trainer = train(recipes, [*rest, *limits, FEW_STEPS], directory, resume="auto", folder=folder)
        if trainer.is_global_zero:
            step = trainer.global_step
            print(f"dry run: checkpoint written, resumed and trained to step {step}; the recipe is ready")
    return 0


@contextmanager
def _common_folder() -> Iterator[Path]:
    """A folder that all processes of the run share; the first one makes it and removes it."""
    if not is_first_process():
        yield Path(os.environ[FOLDER]) if FOLDER in os.environ else _agreed_folder(os.environ)
        return
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        # torchrun or srun started the processes, so that none can hand anything to the others beforehand
        place = _agreed_folder(os.environ)
        shutil.rmtree(place, ignore_errors=True)  # left by a dry run that was killed
        place.mkdir(parents=True)
    else:
        place = Path(tempfile.mkdtemp(prefix="diffzoo-dry-run-"))
        os.environ[FOLDER] = str(place)
    try:
        yield place
    finally:
        os.environ.pop(FOLDER, None)
        shutil.rmtree(place, ignore_errors=True)


def _agreed_folder(environment: Mapping[str, str]) -> Path:
    """A folder named after the job in the current directory, which nodes share if they share the run's directory."""
    job = environment.get("SLURM_JOB_ID") or "-".join(environment.get(k, "") for k in ("MASTER_ADDR", "MASTER_PORT"))
    return Path(f".diffzoo-dry-run-{job}").absolute()


# -- what is evaluated: whether the real run will get through, not how good it is


class FewSamplerSteps(L.Callback):
    """Limits evaluations to few images and few sampler steps: a dry run needs the memory of the run, not its time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast("DiffusionModule", pl_module)
        try:
            fewer = replace(module.sampler, steps=min(module.sampler.steps, STEPS))
            fewer.times(module.process)
        except UserError:  # a solver or a grid of a fixed number of steps
            return
        module.sampler = fewer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleGrid) and callback.final_steps is not None:
                callback.final_steps = min(callback.final_steps, STEPS)
            if isinstance(callback, SamplingCallback):
                callback.n = min(callback.n, IMAGES)
                callback.steps = None if callback.steps is None else min(callback.steps, STEPS)


class TrialEvaluation(FewSamplerSteps):
    """At the end of training, samples and measures a few images as evaluation would, and prints the values.

    The recipe's own `ImageMetrics` are called, so that missing weights of feature networks or references show here;
    without any, the Fréchet distance of fixed random features to the first training images is measured.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, values = cast("DiffusionModule", pl_module), dict[str, float]()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # those without a reference compare with the data itself
            if isinstance(callback, ImageMetrics) and callback.reference:
                kept, callback.n = callback.n, IMAGES
                values |= callback.measure(trainer, module)
                callback.n = kept
        values = values or self._distance(trainer, module)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no metric, the data has latents"
        say(f"dry run: {IMAGES} images sampled in {module.sampler.steps} sampler steps and measured: {shown}")

    def _distance(self, trainer: L.Trainer, module: "DiffusionModule") -> dict[str, float]:
        metric, path = "frechet:random-conv", Path(trainer.default_root_dir) / "trial.npz"
        made = trainer.is_global_zero and self._reference(data_of(trainer), metric, path)
        made = trainer.strategy.broadcast(made)  # all ranks agree: each samples its share
        if not made:  # images are sampled and decoded all the same
            report = MemorisationReport("random-conv", IMAGES, batch_size=BATCH)
            report.sample(trainer, module)
            return {}
        metrics = ImageMetrics(str(path), [metric], every_n_steps=0, n=IMAGES, batch_size=BATCH)
        return metrics.measure(trainer, module)

    def _reference(self, data: L.LightningDataModule, metric: str, path: Path) -> bool:
        """Write statistics of the first training images; False if there are none."""
        if not hasattr(data, "one_pass"):
            return False
        batches = cast("ImageDataModule", data).one_pass("train", IMAGES)
        first = next(iter(batches))
        if "image" not in first:
            return False
        networks = list(load_networks([metric]).values())
        make_reference([first] if len(first["image"]) > 1 else batches, networks, path, keep=0)
        return True
