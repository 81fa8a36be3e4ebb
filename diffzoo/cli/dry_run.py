"""`diffzoo fit --dry-run`: everything a long run will need, in minutes and before it starts.

Two real steps of the recipe as it is, a preview, an evaluation on 64 images, a checkpoint, and a resume that takes one
more step.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["dry_run"]

EVALUATION = "--trainer.callbacks+=diffzoo.training.trial.TrialEvaluation"


def dry_run(recipes: Sequence[Path], rest: Sequence[str], folder: str | None = None) -> int:
    """Run the recipe for two steps in a temporary directory, then resume it for a third; nothing is kept.

    Args:
        recipes: YAML files; later ones win.
        rest: options in LightningCLI's form.
        folder: replaces the recipe's data by a folder of images.
    """
    from diffzoo.cli.fit import train

    with tempfile.TemporaryDirectory(prefix="diffzoo-dry-run-") as place:
        directory = Path(place) / "run"
        limits = ["--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
        train(recipes, [*rest, *limits, EVALUATION, "--trainer.max_steps=2"], directory, folder=folder)
        pictures = sorted(p.name for p in (directory / "samples").glob("*.png"))
        print(f"dry run: two steps done, previews: {', '.join(pictures) or 'none in this recipe'}")
        limits.append("--trainer.max_steps=3")
        trainer = train(recipes, [*rest, *limits], directory, resume="auto", folder=folder)
        print(f"dry run: checkpoint written, resumed and trained to step {trainer.global_step}; the recipe is ready")
    return 0
