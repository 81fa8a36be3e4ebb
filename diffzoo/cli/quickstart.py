"""`diffzoo quickstart`: a small Simple Diffusion U-ViT on real images, from nothing to a grid in minutes."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffzoo.errors import UserError
from diffzoo.runs import Run, free_directory

if TYPE_CHECKING:
    from diffzoo.training.module import DiffusionModule

RECIPE = "emoji/simple_uvit_xs_32"
FEWEST, MOST = 1500, 6000  # steps that make the classes recognisable, and steps that still pay on this data
GRIDS = 375  # steps between two grids
JUDGED = 100  # samples that are compared with training images at the end


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `diffzoo quickstart`."""
    parser.add_argument("--minutes", type=float, default=4.0, help=f"time of training, but at least {FEWEST} steps")
    parser.add_argument("--run", default="runs/quickstart", help="directory of the run (default runs/quickstart)")
    parser.add_argument("--data.folder", dest="folder", help="train on your own images; sub-folders are classes")
    parser.add_argument("--steps", type=int, help="train this many steps instead of a time")


def run(args: argparse.Namespace) -> int:
    """Train, sample, and say what was written where."""
    from diffzoo.cli.fit import report_of_run
    from diffzoo.recipe.files import find_recipe
    from diffzoo.recipe.train import train

    if args.minutes <= 0 or (args.steps is not None and args.steps < 1):
        raise UserError("--minutes and --steps are positive")
    recipe = find_recipe(RECIPE)
    directory = free_directory(Path(args.run))
    _announce(args, directory)
    steps = args.steps or MOST
    options = [
        f"--trainer.max_steps={steps}",
        f"--model.lr_scheduler.init_args.total_steps={steps}",
        f"--model.lr_scheduler.init_args.warmup_steps={min(50, steps // 10)}",
        f"--trainer.val_check_interval={min(GRIDS, steps)}",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.callbacks+={{class_path: diffzoo.training.verdict.GridVerdict, init_args: {{n: {JUDGED}}}}}",
    ]
    if not args.steps:
        budget = f"{{minutes: {args.minutes}, fewest: {FEWEST}, most: {MOST}}}"
        options.append(
            f"--trainer.callbacks+={{class_path: diffzoo.training.time_budget.TimeBudget, init_args: {budget}}}"
        )
    start = time.monotonic()
    trainer = train([recipe], options, directory, folder=args.folder)
    minutes = (time.monotonic() - start) / 60
    print(f"trained {trainer.global_step} steps in {minutes:.1f} minutes; samples: {Run(directory).samples}/final.png")
    print(f"checkpoints: {Run(directory).checkpoints}; curves: {Run(directory).metrics}")
    report_of_run(directory)
    classes = cast("DiffusionModule", trainer.lightning_module).network.config.num_classes
    chosen = f" --classes {' '.join(map(str, (3, 7) if classes > 7 else range(min(2, classes))))}" if classes else ""
    print(f"more:        diffzoo sample {directory}{chosen} --seeds 0-15 --steps 50 --out grid.png")
    return 0


def _announce(args: argparse.Namespace, directory: Path) -> None:
    """Say what will be trained, on what, for how long, and when there is something to see."""
    import torch

    from diffzoo.data import DemoData, ImageFolder
    from diffzoo.models.summary import describe

    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"the CPU, {threads} threads"
    data = ImageFolder(args.folder, image_size=32) if args.folder else DemoData(image_size=32)
    images, classes = len(data.train_source), data.num_classes
    kinds = f" in {classes} classes" if classes else ""
    parameters = describe("simple_uvit_xs_32", num_classes=classes).parameters
    length = f"{args.steps} steps" if args.steps else f"about {args.minutes:g} minutes, at least {FEWEST} steps"
    print(f"simple_uvit_xs_32, {parameters / 1e6:.2g} M parameters, on {device}", flush=True)
    print(f"{args.folder or 'demo set of emoji'}: {images} images{kinds}, at 32 px", flush=True)
    print(f"training {length}; a grid of samples every {GRIDS} steps in {Run(directory).samples}", flush=True)
