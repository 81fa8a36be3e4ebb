"""The noise of one step, 64 images of 3 x 256 x 256 on one CPU thread: Philox, compiled and eager, against one
`torch.Generator` per image, which drew it before.

    python benchmarks/noise.py

The three take turns in one process; ratios are medians over the rounds. Exits with 1 where compiled Philox takes more
than half of the generators' time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffzoo import philox


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, n = (3, args.size, args.size), args.images
    place, draw, key = torch.arange(n), torch.zeros(n, dtype=torch.int64), 1234567
    kernel, keys, quads = philox.compiled_quads(), philox._key_tensor(key, torch.device("cpu")), 3 * args.size**2 // 4
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    ways: dict[str, Callable[[], Tensor]] = {
        "generators": lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]),
        "compiled": lambda: kernel(keys, place, draw, quads),
        "eager": lambda: philox._eager(philox.round_keys(key), place, draw, quads),
    }
    started = time.process_time()
    kernel(keys, place, draw, quads)
    print(f"compiled in {time.process_time() - started:.1f} s of processor time")
    took: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.rounds):
        for name in ways if i % 2 else reversed(ways):
            started = time.process_time()
            ways[name]()
            took[name].append(time.process_time() - started)
    for name, seconds in took.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, took["generators"], strict=True))
        print(f"{name:10} {1e3 * statistics.median(seconds):7.1f} ms  {ratio:.2f} of the generators")
    ratio = statistics.median(a / b for a, b in zip(took["compiled"], took["generators"], strict=True))
    return int(ratio > 0.5)


if __name__ == "__main__":
    sys.exit(main())
