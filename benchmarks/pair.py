"""Two U-ViTs of equal size, ours and denoising_diffusion_pytorch's, and a clock that alternates between them."""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffzoo.models.base import Level
from diffzoo.models.simple_uvit import SimpleUViT, SimpleUViTConfig
from diffzoo.training.gpus import present_gpu

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
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.bf16 else nullcontext()


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


def gflops_of(net: nn.Module, args: argparse.Namespace) -> float:
    """GFLOPs of one image's forward pass, two per multiply-add; the network is on the CPU, not compiled."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, args.image_size, args.image_size), torch.zeros(1))
    return counter.get_total_flops() / 1e9


def both(args: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The two networks on the device, compiled if asked, and the GFLOPs of a forward pass; prints their sizes."""
    torch.manual_seed(0)
    rival = theirs(args)
    size = sum(p.numel() for p in rival.parameters())
    networks = {"ours": ours(args, size), "theirs": rival}
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, {args.image_size} px, batch {args.batch}")
    gflops = {name: gflops_of(net, args) for name, net in networks.items()}
    for name, net in networks.items():
        size = sum(p.numel() for p in net.parameters())
        print(f"{name:<7} {size / 1e6:8.2f} M parameters, {gflops[name]:.2f} GFLOPs an image forward")
        net.to(args.device)
        if args.compile:
            net.compile(dynamic=False)
    return networks, gflops


def images_per_second(
    runs: dict[str, Callable[[], None]], images: int, gflops: dict[str, float], args: argparse.Namespace
) -> None:
    """Alternate between the runs, after one to warm up, and print medians and the median of the rounds' ratios.

    Args:
        runs: what to time.
        images: how many images one call makes or trains on.
        gflops: useful GFLOPs per image; on a known GPU in bfloat16 also their share of its peak is printed, the MFU.
        args: the command line.
    """
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
    gpu = present_gpu() if args.device.startswith("cuda") and args.bf16 else None
    for name, taken in seconds.items():
        rate = images / statistics.median(taken)
        tflops = rate * gflops[name] / 1e3
        mfu = f", MFU {100 * tflops / gpu.tflops:.1f} %" if gpu else ""
        print(f"{name:<7} {rate:8.2f} images/s, {tflops:.3f} TFLOP/s{mfu}")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    how = ("compiled" if args.compile else "eager") + (", bf16" if args.bf16 else "")
    print(f"ratio   {statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f}; {args.device}, {how})")


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
