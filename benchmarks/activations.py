"""Memory of a training step with and without recomputed activations, and the time of a step.

    python benchmarks/activations.py                              # simple_uvit_b_64, 16 images
    python benchmarks/activations.py --time simple_uvit_xs_32     # also seconds a step of a small network, CPU

Memory is that of `diffzoo plan`: activations at their peak, for tensors without data, beside weights, gradients, the
two moments of AdamW and one EMA in float32. Times take turns.
"""

import argparse
import statistics
import time

import torch

from diffzoo import create_model
from diffzoo.models.base import Recompute
from diffzoo.training.planning import Plan, network_cost
from diffzoo.typing import Condition

WAYS: tuple[Recompute, ...] = (False, "all_but_attention", True)


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="simple_uvit_b_64")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--time", metavar="MODEL", help="a network small enough to train here")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    peaks: dict[Recompute, float] = {}
    for way in WAYS:
        with torch.device("meta"):
            network = create_model(args.model)
        network.set_grad_checkpointing(way)
        peaks[way] = Plan(network_cost(network), batch=args.batch).training(args.batch)
    print(f"{args.model}, {args.batch} images, bf16-mixed, AdamW, one EMA")
    for way, peak in peaks.items():
        print(f"recomputed: {way!s:<18} {peak / 2**30:7.2f} GiB   {peak / peaks[False]:.2f}")
    if args.time:
        seconds(args.time, args.batch, args.rounds)


def seconds(name: str, batch: int, rounds: int) -> None:
    """Forward and backward of a small network, in processor time, and that the gradients agree."""
    network = create_model(name, num_classes=10).train()
    torch.manual_seed(0)
    n = network.config.image_size
    z, level, cond = torch.randn(batch, 3, n, n), torch.randn(batch), Condition(label=torch.arange(batch) % 10)
    for p in network.parameters():  # zero-initialised outputs would hide the blocks
        torch.nn.init.normal_(p, std=0.02)
    taken: dict[Recompute, list[float]] = {way: [] for way in WAYS}
    found = {}
    for _ in range(rounds):
        for way in WAYS:
            network.set_grad_checkpointing(way)
            network.zero_grad()
            start = time.process_time()
            loss = network(z, level, cond).square().mean()
            loss.backward()
            taken[way].append(time.process_time() - start)
            found[way] = loss.item(), [p.grad.clone() for p in network.parameters() if p.grad is not None]
    base = statistics.median(taken[False])
    print(f"\n{name}, {batch} images, float32, CPU")
    for way, times in taken.items():
        same = found[way][0] == found[False][0] and all(map(torch.equal, found[way][1], found[False][1]))
        print(
            f"recomputed: {way!s:<18} {statistics.median(times):7.3f} s   {statistics.median(times) / base:.2f}", end=""
        )
        print("   loss and gradients equal" if same else "   loss or gradients DIFFER")


if __name__ == "__main__":
    main()
