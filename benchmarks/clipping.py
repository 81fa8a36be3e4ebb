"""Gradient norm, clipping, the guard's verdict and AdamW: two norms and a pass over the gradients against one norm.

    python benchmarks/clipping.py                       # 100 M parameters, CPU
    python benchmarks/clipping.py --device cuda

Both ways take turns on the same parameters, gradients and optimizer: `before`, the norm for the guard, then
`clip_grad_norm_`, then the fused step; `now`, one norm, whose factor the fused step divides by. The gradients are
copied afresh before each turn, outside the clock, which on the CPU counts processor time, so that other work does not
disturb it. The last line is the number to quote: now over before.
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffzoo import create_model
from diffzoo.training.gradients import clip_by_norm, gradient_norm, release
from diffzoo.training.guards import GradientGuard
from diffzoo.training.optimizers import FusedAdamW

CLIP = 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="simple_uvit_s_64")
    parser.add_argument("--depth", type=int, default=17, help="transformer blocks")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with torch.device("meta"):
        coarsest = create_model(args.model).config.levels[-1].resolution
    network = create_model(args.model, depth_at={coarsest: args.depth}).to(args.device)
    parameters = list(network.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    optimizer, guard = FusedAdamW(parameters, lr=1e-6), GradientGuard()
    trainer: Any = SimpleNamespace(precision_plugin=None)

    def judged() -> torch.Tensor:
        norm = gradient_norm(optimizer)
        assert norm is not None
        optimizer.found_inf = guard.judge(norm).float().reshape(())
        return norm

    def before() -> None:
        judged()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        release(optimizer)

    def now() -> None:
        clip_by_norm(optimizer, judged(), CLIP, trainer)
        optimizer.step()
        release(optimizer)

    ways = {"before": before, "now": now}
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 2):
        for name, way in ways.items():
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
            synchronize(args.device)
            start = clock()
            way()
            synchronize(args.device)
            if turn > 1:  # the first two warm up
                seconds[name].append(clock() - start)
    size = sum(p.numel() for p in parameters) / 1e6
    print(f"{args.model}, {size:.1f} M parameters, {args.device}, {torch.get_num_threads()} CPU thread(s)")
    for name, taken in seconds.items():
        print(f"{name:<7} {1e3 * statistics.median(taken):8.2f} ms")
    ratios = [b / a for a, b in zip(seconds["before"], seconds["now"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratio   {middle:8.3f}   (quartiles {low:.3f} to {high:.3f}, {args.rounds} pairs)")


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
