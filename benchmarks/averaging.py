"""What averaging costs: `EMA.update` as a share of a training step, in one run.

    python benchmarks/averaging.py [--model dimr_xl_256] [--batch 1] [--averages 2] [--device cuda]

The step is forward, backward, clipping and fused AdamW in bf16-mixed on a GPU, float32 on the CPU. A GPU's step uses a
batch that fills it (--batch 32 for 500 M parameters on 80 GB); on the CPU one image is a step.
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch

import diffzoo.models  # noqa: F401  registers the names
from diffzoo.models.registry import build
from diffzoo.training.ema import EMA
from diffzoo.training.optimizers import FusedAdamW, parameter_groups
from diffzoo.typing import Condition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dimr_xl_256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    network = build(args.model).to(args.device)
    config = network.config
    shape = (args.batch, config.in_channels, config.image_size, config.image_size)
    z, level = torch.randn(shape, device=args.device), torch.rand(args.batch, device=args.device)
    label = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    cond = Condition(label=label) if config.num_classes else None
    optimizer = FusedAdamW(parameter_groups(network))
    decays = [1 - 10.0 ** -(n + 3) for n in range(args.averages)]
    averages = EMA(decays)
    averages.prepare(SimpleNamespace(network=network))  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.device != "cpu"):
            loss = sum(o.float().square().mean() for o in network.training_outputs(z, level, cond))
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    step()
    averages.update()
    steps, updates = [], []
    for _ in range(args.steps):  # in turns, so that both see the same machine
        steps.append(_seconds(step, args.device))
        updates.append(_seconds(averages.update, args.device))
    a, b = statistics.median(steps), statistics.median(updates)
    print(f"{args.model}: {network.num_parameters() / 1e6:.0f} M parameters, {args.device}, batch {args.batch}")
    print(f"training step {1e3 * a:.1f} ms, update of {args.averages} average(s) {1e3 * b:.1f} ms: {100 * b / a:.2f} %")


def _seconds(function: Any, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
