"""Precision and recall of 50,000 images against 10,000: processor time of this version and of another, in one process.

    git show 72bd287:diffzoo/metrics/neighbours.py > before.py
    python benchmarks/neighbours.py before.py --dims 256

The default sizes are those of the evaluator of arXiv:2105.05233. Features are seeded and correlated, as those of a
network are; both versions get the same, one after the other, on one thread. Time is that of the processor, which other
work on the machine does not enter. The last printed output is in `benchmarks/results/neighbours.txt`.
"""

import argparse
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from diffzoo.metrics import neighbours


def features(n: int, dims: int, seed: int) -> Tensor:
    """Non-negative, correlated, with a shift between the seeds."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims // 4, dims, generator=torch.Generator().manual_seed(0)) / dims**0.5
    return ((torch.randn(n, dims // 4, generator=generator) + 0.1 * seed) @ mixing).relu_()


def loaded(path: Path) -> ModuleType:
    """The module in a file."""
    spec = spec_from_file_location("before", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--m", type=int, default=10_000)
    parser.add_argument("--dims", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample, reference = features(args.n, args.dims, 1), features(args.m, args.dims, 2)
    seconds, values = {}, {}
    for name, module in (("now", neighbours), ("before", loaded(args.before))):
        start = time.process_time()
        found = module.precision_recall(sample, reference)
        seconds[name] = time.process_time() - start
        values[name] = f"precision {found.precision:.6f}, recall {found.recall:.6f}"
        print(f"{name:<8}{seconds[name]:8.1f} s of one core   {values[name]}", flush=True)
    print(f"ratio {seconds['before'] / seconds['now']:.2f} at {args.n} x {args.m} x {args.dims}, equal values: "
          f"{len(set(values.values())) == 1}")  # fmt: skip


if __name__ == "__main__":
    main()
