"""A training step of our U-ViT against denoising_diffusion_pytorch's `simple_diffusion.UViT` of equal size.

    pip install denoising-diffusion-pytorch
    python benchmarks/train_step.py                                              # a small pair, CPU
    python benchmarks/train_step.py --image-size 64 --dim 96 --depth 12 --batch 4            # larger, CPU
    python benchmarks/train_step.py --image-size 128 --dim 128 --batch 16 --bf16 --compile   # one GPU

Forward, mean squared error, backward and a fused AdamW step; both networks alternate in one run, so that what else the
machine does falls on both. The last line is the number to quote: theirs over ours, seconds per step. FLOPs are useful
ones, three forward passes a step.
"""

import argparse
from collections.abc import Callable

import torch
from pair import arguments, autocast, both, images_per_second
from torch import Tensor, nn


def stepper(net: nn.Module, z: Tensor, level: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes `args.repeats` training steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        for _ in range(args.repeats):
            with autocast(args):
                loss = (net(z, level) - z).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0])
    networks, gflops = both(args)
    z = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    level = torch.linspace(-8, 8, args.batch, device=args.device)
    runs = {name: stepper(net, z, level, args) for name, net in networks.items()}
    step = {name: 3 * forward for name, forward in gflops.items()}
    images_per_second(runs, args.batch * args.repeats, step, args)


if __name__ == "__main__":
    main()
