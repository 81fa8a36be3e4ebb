"""`diffzoo quickstart`: a small Simple Diffusion U-ViT on real pictures, from nothing to a grid in minutes."""

import argparse
import time
from pathlib import Path
from typing import Any

RECIPE = "emoji/simple_uvit_xs_32"
STEPS = (300, 6000)  # fewest that show anything, most that pay on this data


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `diffzoo quickstart`."""
    parser.add_argument("--minutes", type=float, default=4.0, help="length of training (default 4)")
    parser.add_argument("--run", default="runs/quickstart", help="directory of the run (default runs/quickstart)")
    parser.add_argument("--data.folder", dest="folder", help="train on your own images; sub-folders are classes")
    parser.add_argument("--steps", type=int, help="train this many steps instead of a time")


def run(args: argparse.Namespace) -> int:
    """Train, draw, and say what was written where."""
    from diffzoo.cli.recipe_files import find_recipe
    from diffzoo.cli.train import train

    recipe = find_recipe(RECIPE)
    directory = _free(Path(args.run))
    print(f"recipe {recipe}; everything goes to {directory}", flush=True)
    network_args = _classes(args.folder) if args.folder else []
    steps = args.steps or steps_within(recipe, args.minutes * 60)
    interval = max(50, steps // 4)
    options = [
        f"--trainer.max_steps={steps}",
        f"--model.lr_scheduler.init_args.total_steps={steps}",
        f"--model.lr_scheduler.init_args.warmup_steps={min(50, steps // 10)}",
        f"--trainer.val_check_interval={interval}",
        "--trainer.check_val_every_n_epoch=null",
        *network_args,
    ]
    start = time.monotonic()
    trainer = train([recipe], options, directory, folder=args.folder)
    minutes = (time.monotonic() - start) / 60
    if trainer.interrupted:
        print(f"stopped early; go on with: diffzoo fit -c {directory}/config.yaml --run {directory} --resume auto")
        return 130
    print(f"trained {trainer.global_step} steps in {minutes:.1f} minutes; pictures: {directory}/samples/final.png")
    print(f"checkpoints: {directory}/checkpoints; curves: {directory}/metrics.csv, or tensorboard --logdir {directory}")
    print(f"draw more:   diffzoo sample {directory}{_two(trainer)} --seeds 0-15 --steps 50 --out grid.png")
    return 0


def _two(trainer: Any) -> str:
    """The option that names two classes, where there are any."""
    count = trainer.lightning_module.network.config.num_classes
    return f" --classes {' '.join(map(str, (3, 7) if count > 7 else range(min(2, count))))}" if count else ""


def _free(directory: Path) -> Path:
    """The directory itself, or the next free number of it."""
    candidate, number = directory, 2
    while candidate.exists() and any(candidate.iterdir()):
        candidate = directory.with_name(f"{directory.name}-{number}")
        number += 1
    return candidate


def _classes(folder: str) -> list[str]:
    """As many classes as the folder has sub-folders."""
    from diffzoo.data import ImageFolder

    return [f"--model.network_args.num_classes={ImageFolder(folder).num_classes}"]


def steps_within(recipe: Path, seconds: float, warm_up: int = 3, timed: int = 10) -> int:
    """How many training steps of the recipe fit into a time, measured on this machine.

    Data, averages, logging, validation and previews are allowed a fifth on top of what network and optimizer take.
    """
    import torch
    import yaml

    from diffzoo.factory import create_model
    from diffzoo.typing import Condition

    settings: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = create_model(settings["model"]["network"], **settings["model"].get("network_args", {})).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    batch = settings["data"]["init_args"]["batch_size"]
    config = network.config
    z = torch.randn(batch, config.in_channels, config.image_size, config.image_size, device=device)
    if settings["model"].get("channels_last"):
        network.to(memory_format=torch.channels_last)
        z = z.contiguous(memory_format=torch.channels_last)
    level = torch.zeros(batch, device=device)
    cond = Condition(label=torch.zeros(batch, dtype=torch.long, device=device)) if config.num_classes else None
    start = 0.0
    for step in range(warm_up + timed):
        if step == warm_up:
            start = time.perf_counter()
        network(z, level, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    each = (time.perf_counter() - start) / timed * 1.2
    return int(min(max(seconds / each, STEPS[0]), STEPS[1]))
