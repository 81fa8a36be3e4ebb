"""`diffzoo fit --dry-run`: everything a long run will need, in minutes and before it starts.

Two real steps of the recipe as it is, a preview, an evaluation on 64 images, a checkpoint, and a resume that takes one
more step.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffzoo.recipe.train import train
from diffzoo.runs import Run, is_first_process

__all__ = ["dry_run"]

EVALUATION = "--trainer.callbacks+=diffzoo.training.dry_run.TrialEvaluation"
FEW_STEPS = "--trainer.callbacks+=diffzoo.training.dry_run.FewSamplerSteps"
FOLDER = "DIFFZOO_DRY_RUN"  # tells the processes that Lightning starts where the first one works


def dry_run(recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> int:
    """Run the recipe for two steps in a temporary directory, then resume it for a third; nothing is kept.

    Args:
        recipes: YAML files; later ones win.
        rest: options in LightningCLI's form.
        folder: replaces the recipe's data by a folder of images.
    """
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
            print(
                f"dry run: checkpoint written, resumed and trained to step {trainer.global_step}; the recipe is ready"
            )
    return 0


@contextmanager
def _common_folder() -> Iterator[Path]:
    """A folder that all processes of the run share; the first one makes it and removes it."""
    if not is_first_process():
        yield Path(os.environ[FOLDER]) if FOLDER in os.environ else _agreed_folder(os.environ)
        return
    if _started_from_outside(os.environ):
        place = _agreed_folder(os.environ)
        shutil.rmtree(place, ignore_errors=True)  # of a trial that was killed
        place.mkdir(parents=True)
    else:
        place = Path(tempfile.mkdtemp(prefix="diffzoo-dry-run-"))
        os.environ[FOLDER] = str(place)
    try:
        yield place
    finally:
        os.environ.pop(FOLDER, None)
        shutil.rmtree(place, ignore_errors=True)


def _started_from_outside(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun started the processes, so that none can hand anything to the others beforehand."""
    return "RANK" in environment or "SLURM_PROCID" in environment


def _agreed_folder(environment: Mapping[str, str]) -> Path:
    """In the current directory, which nodes share where they share a run's directory; named after the job."""
    job = environment.get("SLURM_JOB_ID") or "-".join(environment.get(k, "") for k in ("MASTER_ADDR", "MASTER_PORT"))
    return Path(f".diffzoo-dry-run-{job}").absolute()
