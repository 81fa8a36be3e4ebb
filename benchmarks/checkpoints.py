"""How long training stands still for a checkpoint, and how much memory writing it takes.

    python benchmarks/checkpoints.py                      # 125 M parameters, 2 GB of state
    python benchmarks/checkpoints.py --millions 500       # 8 GB of state; needs 16 GB of memory

A training step of linear layers with AdamW and a copy of the weights in place of the EMA, as a checkpoint holds them.
Three ways to save take turns: `in the loop` waits for the file, `meanwhile` goes on, and `as a run does` goes on too,
but the first optimizer step waits for the file, at most two seconds. Memory is the proportional set size of the
process and its children (Linux), sampled every 20 ms through saving and three steps; the peak of three steps without
a checkpoint is 1. The time that training stands still is that of saving and of waiting.

A forked child writes the memory of training itself. Forward and backward passes leave weights, moments and EMA alone,
so nothing is held twice until the optimizer's step, which changes all of it; what has not been written by then is
held twice. A step that is long beside the disk therefore costs neither time nor memory (real networks: hundreds of
FLOPs per parameter and image; here `--rows` sets it), and with a slow disk one has to choose: wait, or hold the rest
twice.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffzoo.training.checkpoint_files import PATIENCE
from diffzoo.training.checkpoint_io import BackgroundCheckpointIO


def set_size() -> int:
    """Proportional set size of this process and its children, in bytes."""
    children = Path("/proc/self/task").glob("*/children")
    total = 0
    for process in ["self", *(pid for file in children for pid in file.read_text().split())]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def peak_of(act: Callable[[], None]) -> int:
    """The largest set size while something is done."""
    peak, over = [set_size()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], set_size())

    watcher = threading.Thread(target=watch)
    watcher.start()
    act()
    over.set()
    watcher.join()
    return peak[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=125, help="parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256, help="of the input: how long a step takes")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary one")
    args = parser.parse_args()
    width = 2048
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(max(1, args.millions * 10**6 // width**2))))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    ema = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(args.rows, width)

    def steps(before_optimizer: Callable[[], None] = lambda: None) -> None:
        for k in range(3):
            network(x).square().mean().backward()
            if not k:
                before_optimizer()
            optimizer.step()
            optimizer.zero_grad()

    steps()
    plain = peak_of(steps)
    writer = BackgroundCheckpointIO()
    ways = ("in the loop", "meanwhile", "as a run does")
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.rounds):
            for way in ways:

                def act(way: str = way) -> None:
                    start = time.perf_counter()
                    state = {"state_dict": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
                    writer.save_checkpoint(state, Path(folder) / "a.ckpt")
                    finishing = threading.Thread(target=writer.finish)
                    finishing.start()
                    if way == "in the loop":
                        finishing.join()
                    stalls[way].append(time.perf_counter() - start)

                    def wait() -> None:
                        start = time.perf_counter()
                        finishing.join(PATIENCE)
                        stalls[way][-1] += time.perf_counter() - start

                    steps(wait if way == "as a run does" else lambda: None)
                    finishing.join()

                peaks[way].append(peak_of(act) / plain)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{size:.0f} M parameters, {16 * size / 1e3:.1f} GB of state, {torch.get_num_threads()} CPU thread(s)")
    for way, stall in stalls.items():
        print(f"{way:<13} stands still {statistics.median(stall):7.2f} s, peak memory {max(peaks[way]):.2f}")


if __name__ == "__main__":
    main()
