"""Evaluation and latent encoding end to end, against their parts one after another.

    python benchmarks/end_to_end.py

Evaluation: the blocks of `diffzoo eval` from seeds to features in files, against sampling the same images and
extracting their features; the metrics, which come once at the end, are left out. Encoding: `encode` into shards,
against decoding the same images and encoding them. A rate of 1 means that nothing is lost between the parts; more,
that they overlap. Both take turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffzoo.data import ImageFolder
from diffzoo.data.encode import encode, make_cache_metadata
from diffzoo.evaluation.blocks import Blocks, Job
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.evaluation.protocols import protocol
from diffzoo.generation.plan import default_plan
from diffzoo.images import to_float, to_uint8
from diffzoo.metrics import extract, load_features
from diffzoo.zoo.loading import load_any

Timed = Callable[[], float]


def seconds(work: Callable[[], object]) -> float:
    """Of the clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def evaluation(model: str, n: int, steps: int, device: str) -> tuple[Timed, Timed]:
    """(parts, whole): seconds to make and measure `n` images of a model under the protocol `demo`."""
    loaded = load_any(model)
    plan = default_plan(model, loaded.metadata)
    plan = replace(plan, sampler=replace(plan.sampler, steps=steps))
    source = ModelImages(plan, device)
    rule = replace(protocol("demo"), n=n, image_size=source.image_size)
    network = load_features("random-conv", device=device)
    job = Job(source, rule, ((network.name, None),), device)
    source.images(0, 1)  # loads the model

    def parts() -> float:
        def work() -> None:
            for start in range(0, n, 100):
                extract(network, to_uint8(source.images(start, min(100, n - start))))

        return seconds(work)

    def whole() -> float:
        with tempfile.TemporaryDirectory() as out:
            return seconds(lambda: Blocks(Path(out), plan, rule, 100).fill(job))

    return parts, whole


class Encoder(nn.Module):
    """As Stable Diffusion's encoder, narrower, with random weights: three halvings, mean and standard deviation."""

    id, hash = "random", "0" * 64

    def __init__(self, width: int):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1), nn.SiLU())
        ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 8, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.layers(images.to(self.layers[0].weight.device)).chunk(2, dim=1)
        return mean, log_std.exp()


def encoding(n: int, width: int, device: str, workers: int, scratch: Path) -> tuple[Timed, Timed]:
    """(parts, whole): seconds to decode `n` JPEG files of 256 px, crop them and encode them and their mirror images."""
    from PIL import Image

    numbers = np.random.default_rng(0)
    for i in range(n):
        noise = numbers.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 320), Image.Resampling.BICUBIC).save(scratch / f"{i:04d}.jpg", quality=90)
    data = ImageFolder(str(scratch), image_size=256, batch_size=16, num_workers=0)
    encoder = Encoder(width).to(device)
    metadata = make_cache_metadata(data.train_source, data.transform, 2, encoder, 256)

    def parts() -> float:
        def work() -> None:
            for batch in data.train_dataloader():
                for view in (batch["image"], batch["image"].flip(-1)):
                    torch.cat(encoder(to_float(view)), dim=1).half().cpu()

        return seconds(work)

    def whole() -> float:
        with tempfile.TemporaryDirectory() as out:
            give = (data.train_source, Path(out), data.transform, encoder, metadata)
            return seconds(lambda: encode(*give, batch_size=16, num_workers=workers))

    return parts, whole


def main() -> None:
    """Alternate, and print medians and the rate of the whole, relative to its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="simple_uvit_xs_32.emoji")
    parser.add_argument("--n", type=int, default=200, help="images to evaluate")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--encode", type=int, default=512, help="images to encode")
    parser.add_argument("--width", type=int, default=32, help="of the encoder")
    parser.add_argument("--workers", type=int, default=0, help="that decode for the encoder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # as evaluation has it, whose numbers must not depend on the machine
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {
            "evaluation": evaluation(args.model, args.n, args.steps, args.device),
            "encoding": encoding(args.encode, args.width, args.device, args.workers, Path(scratch)),
        }
        for name, (parts, whole) in jobs.items():
            parts(), whole()
            pairs = [(parts(), whole()) for _ in range(args.rounds)]
            rates = sorted(first / second for first, second in pairs)
            medians = (statistics.median(column) for column in zip(*pairs, strict=True))
            times = "parts {:.2f} s, whole {:.2f} s".format(*medians)
            print(f"{name:<11} {times}, rate {statistics.median(rates):.3f} ({rates[0]:.3f} to {rates[-1]:.3f})")


if __name__ == "__main__":
    main()
