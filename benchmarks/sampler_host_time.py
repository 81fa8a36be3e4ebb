"""What a sampling step costs beside the network: ours against the schedulers of diffusers, with a network that is free.

    python benchmarks/sampler_host_time.py

Both walk 50 steps in one process and take turns; each ratio is the median of the ratios of paired rounds. Noise comes
from the compiled kernel, as in a long run; `--eager-noise` measures the first images of a process. Exits with 1 where a
target is missed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffzoo import philox
from diffzoo.process import Eps, GaussianProcess
from diffzoo.rng import ImageNoise
from diffzoo.sampling import DDIM, Ancestral, Denoiser, DPMSolverMultistep, Euler, Heun, Sampler
from diffzoo.sampling.loop import integrate

SHAPE = (3, 8, 8)
STEPS = 50
# sampler, scheduler of diffusers, most that ours may take of theirs
PAIRS: list[tuple[str, Sampler, str, float]] = [
    ("DDIM", DDIM(steps=STEPS), "DDIMScheduler", 0.7),
    ("DPM++ 2M", DPMSolverMultistep(steps=STEPS), "DPMSolverMultistepScheduler", 0.7),
    ("ancestral", Ancestral(steps=STEPS), "DDPMScheduler", 1.0),
    ("Heun", Heun(steps=STEPS), "HeunDiscreteScheduler", 1.0),
    ("Euler", Euler(steps=STEPS), "EulerDiscreteScheduler", 1.0),
]


class Free:
    """A network that returns what it was given long ago."""

    def __init__(self, batch: int):
        self.output = torch.randn(batch, *SHAPE)

    def __call__(self, z: Tensor, noise_level: Tensor, cond: object = None) -> Tensor:
        return self.output

    def null_condition(self, cond: object) -> None:
        return None


def ours(sampler: Sampler, batch: int) -> Callable[[], int]:
    """A function that samples one batch and returns the number of steps."""
    denoise = Denoiser(Free(batch), GaussianProcess(prediction=Eps()))
    start = torch.randn(batch, *SHAPE)

    def run() -> int:
        integrate(denoise, sampler, start, ImageNoise(range(batch)))
        return STEPS

    return run


def theirs(name: str, batch: int) -> Callable[[], int]:
    """The same with a scheduler of diffusers."""
    import diffusers

    made = getattr(diffusers, name)()
    network, start = Free(batch), torch.randn(batch, *SHAPE)
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    more = {"generator": generators} if name in ("DDPMScheduler", "DDIMScheduler") else {}

    @torch.no_grad()
    def run() -> int:
        made.set_timesteps(STEPS)
        z = start * made.init_noise_sigma
        for t in made.timesteps:
            read = made.scale_model_input(z, t)
            z = made.step(network(read, t.expand(batch)), t, z, **more).prev_sample
        return STEPS

    return run


def seconds(run: Callable[[], int], repeats: int) -> float:
    """Processor time per step."""
    started, steps = time.process_time(), 0
    for _ in range(repeats):
        steps += run()
    return (time.process_time() - started) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--eager-noise", action="store_true")
    args = parser.parse_args()
    if not args.eager_noise:
        philox.compile_now("cpu")
    torch.set_num_threads(1)
    missed = 0
    print(f"{args.batch} x {SHAPE}, {STEPS} steps, {args.rounds} rounds, µs of processor time per step")
    for label, sampler, name, limit in PAIRS:
        here, there = ours(sampler, args.batch), theirs(name, args.batch)
        seconds(here, 2), seconds(there, 2)
        rounds = []
        for i in range(args.rounds):
            order = (here, there) if i % 2 else (there, here)
            took = {run: seconds(run, args.repeats) for run in order}
            rounds.append((took[here], took[there]))
        ratio = statistics.median(a / b for a, b in rounds)
        a, b = (1e6 * statistics.median(column) for column in zip(*rounds, strict=True))
        missed += ratio > limit
        verdict = "MISSED" if ratio > limit else "ok"
        print(f"{label:10} ours {a:6.1f}  diffusers {b:6.1f}  ratio {ratio:.2f}  at most {limit:.2f}  {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
