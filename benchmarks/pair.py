"""Two U-ViTs of equal size, ours and denoising_diffusion_pytorch's, and a clock that alternates between them."""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from diffzoo.models.base import Level
from diffzoo.models.simple_uvit import SimpleUViT, SimpleUViTConfig

Network = Callable[[Tensor, Tensor], Tensor]


def arguments(description: str) -> argparse.Namespace:
    """The command line that both benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32, help="width of the finest level; the others 1, 2 and 4 times it")
    parser.add_argument("--depth", type=int, default=6, help="transformer blocks of theirs, and about of ours")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="alternating measurements of each")
    parser.add_argument("--repeats", type=int, default=2, help="training steps, or pictures' batches, per measurement")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps (sampling.py)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="both compiled by torch.compile")
    return parser.parse_args()


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    """Bfloat16 autocast where it is asked for."""
    return torch.autocast(args.device, torch.bfloat16) if args.bf16 else nullcontext()


def theirs(args: argparse.Namespace) -> nn.Module:
    """Their U-ViT: two convolutional blocks a level and a transformer three halvings below the image."""
    from denoising_diffusion_pytorch.simple_diffusion import UViT

    return UViT(args.dim, dim_mults=(1, 2, 4), vit_depth=args.depth, vit_dropout=0.0)


def ours(args: argparse.Namespace, parameters: int) -> nn.Module:
    """Ours at the same resolutions and convolutional widths; the transformer's size makes the parameters equal.

    Theirs has attention of 4 x 32 channels whatever the width, and linear attention and 7x7 convolutions outside the
    transformer; the search is over depth and width of our transformer.
    """
    d, n = args.dim, args.image_size
    outer = tuple(Level(n >> i, d * m, 2) for i, m in enumerate((1, 1, 2)))

    def config(depth: int, width: int) -> SimpleUViTConfig:
        last = Level(n >> 3, width, depth, attention=True, heads=4)
        return SimpleUViTConfig(image_size=n, emb_channels=4 * d, levels=(*outer, last))

    def count(depth: int, width: int) -> int:
        with torch.device("meta"):
            return SimpleUViT(config(depth, width)).num_parameters()

    choices = [
        (depth, width) for depth in (args.depth - 1, args.depth, args.depth + 1) for width in range(2 * d, 8 * d, 8)
    ]
    depth, width = min(choices, key=lambda c: abs(count(*c) - parameters))
    return SimpleUViT(config(depth, width))


def both(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The two networks on the device, compiled if asked; prints their sizes."""
    torch.manual_seed(0)
    rival = theirs(args)
    size = sum(p.numel() for p in rival.parameters())
    networks = {"ours": ours(args, size), "theirs": rival}
    for name, net in networks.items():
        print(f"{name:<7} {sum(p.numel() for p in net.parameters()) / 1e6:8.2f} M parameters")
        net.to(args.device)
        if args.compile:
            net.compile(dynamic=False)
    return networks


def images_per_second(runs: dict[str, Callable[[], None]], images: int, args: argparse.Namespace) -> None:
    """Alternate between the runs, after one to warm up, and print medians and the median of the rounds' ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.rounds):
        for name, run in runs.items():
            _synchronize(args.device)
            start = time.perf_counter()
            run()
            _synchronize(args.device)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        print(f"{name:<7} {images / statistics.median(taken):8.2f} images/s")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    how = ("compiled" if args.compile else "eager") + (", bf16" if args.bf16 else "")
    print(f"ratio   {statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f}; {args.device}, {how})")


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
