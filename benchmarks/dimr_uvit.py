"""DiMR and U-ViT against a diffusion transformer of the same size from `diffusers`, in one process.

    python benchmarks/dimr_uvit.py                           # small models of the published widths
    python benchmarks/dimr_uvit.py --full                    # dimr_xl_256, uvit_bao_l_256, uvit_bao_h_256
    python benchmarks/dimr_uvit.py --dtype bf16 --compile --device cuda --batch 32

Prints, per model: parameters, forward GFLOPs per image, time per image of a forward and of a training pass (forward
and backward), useful TFLOP/s, and the ratio of its useful FLOP rate to the peer's, which is what compares networks of
different cost. Ours and the peer take turns, so that a change of the machine's speed meets both; ratios are medians
over the rounds. Needs the extra `latent` (diffusers).

A time counts the useful FLOPs alone: 1 forward, or 3 for a training pass, recomputation not counted. On a known GPU
with `--dtype bf16` their share of the card's peak is printed too: for training, the model FLOPs utilisation (MFU).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffzoo.models import Network, entry
from diffzoo.models.dimr import DiMR, DiMRConfig
from diffzoo.models.uvit_bao import UViTBao, UViTBaoConfig
from diffzoo.training.gpus import present_gpu
from diffzoo.typing import Condition

FULL = ("dimr_xl_256", "uvit_bao_l_256", "uvit_bao_h_256")


class Contender(NamedTuple):
    """A network and how to call it on (latents, noise level in [0, 1], labels)."""

    name: str
    network: nn.Module
    call: Callable[[Tensor, Tensor, Tensor], Any]
    gflops: float


def small(name: str) -> Network:
    """The published widths with few blocks: the same matrix shapes in a fraction of the time."""
    config = entry(name).config
    if isinstance(config, DiMRConfig):
        coarse, fine = config.stages
        return DiMR(replace(config, stages=(replace(coarse, depth=7), replace(fine, depth=5))))
    assert isinstance(config, UViTBaoConfig)
    return UViTBao(replace(config, depth=5))


def ours(name: str, full: bool) -> Contender:
    """One of our networks with random weights."""
    network = entry(name).network(entry(name).config) if full else small(name)

    def call(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        level = 8 * t - 4 if isinstance(network, DiMR) else 1000 * t
        if network.training:
            return network.training_outputs(z, level, Condition(label=label))
        return (network(z, level, Condition(label=label)),)

    return Contender(name, network, call, gflops_of(network, call))


def peer(parameters: int) -> Contender:
    """A DiT of about as many parameters: 1024 wide, patches of 2, as many layers as fit."""
    layers = max(1, round((parameters - 3e6) / 21e6))
    network = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=64, in_channels=4, num_layers=layers, sample_size=32, patch_size=2
    )

    def call(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (network(z, timestep=1000 * t, class_labels=label, return_dict=False)[0],)

    return Contender(f"diffusers DiT, {layers} layers", network, call, gflops_of(network, call))


def gflops_of(network: nn.Module, call: Callable[..., Any]) -> float:
    """Forward GFLOPs of one image."""
    training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*inputs(1, "cpu"))
    network.train(training)
    return counter.get_total_flops() / 1e9


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels."""
    z = torch.randn(batch, 4, 32, 32, device=device)
    return z, torch.linspace(0.1, 0.9, batch, device=device), torch.arange(batch, device=device) % 1000


def precision(device: str, dtype: str) -> AbstractContextManager[Any]:
    """Autocast, or nothing for float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def seconds(contender: Contender, mode: str, batch: int, device: str, dtype: str) -> float:
    """One pass; on one thread the process's own time, which other load on the machine does not enter."""
    contender.network.train(mode == "train")
    data = inputs(batch, device)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    with precision(device, dtype), torch.set_grad_enabled(mode == "train"):
        outputs = contender.call(*data)
        loss = torch.stack([out.float().square().mean() for out in outputs]).sum()
    if mode == "train":
        loss.backward()
    loss.item()  # waits for the accelerator
    taken = clock() - start
    contender.network.zero_grad(set_to_none=True)
    return taken


def compare(a: Contender, b: Contender, mode: str, args: argparse.Namespace) -> None:
    """Alternate the two and print medians."""
    rounds = []
    for i in range(args.rounds + 1):
        order = (a, b) if i % 2 == 0 else (b, a)
        times = {c.name: seconds(c, mode, args.batch, args.device, args.dtype) / args.batch for c in order}
        if i:  # the first round warms up
            rounds.append((times[a.name], times[b.name]))
    cost = 3 if mode == "train" else 1
    gpu = present_gpu() if args.device.startswith("cuda") and args.dtype == "bf16" else None
    ratios = [(a.gflops / x) / (b.gflops / y) for x, y in rounds]
    for contender, taken in zip((a, b), zip(*rounds, strict=True), strict=True):
        median = statistics.median(taken)
        tflops = cost * contender.gflops / median / 1e3
        share = f" {100 * tflops / gpu.tflops:5.1f} % of peak" if gpu else ""
        millions = sum(p.numel() for p in contender.network.parameters()) / 1e6
        print(
            f"{contender.name:28} {mode:8} {millions:7.1f} M {contender.gflops:8.1f} GF  {median * 1e3:9.1f} ms/image"
            f"  {tflops:7.3f} TFLOP/s{share}"
        )
    print(f"{'':28} useful FLOP rate, ours / peer: {statistics.median(ratios):.2f}\n")


def main() -> None:
    """Compare each of ours with its peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(FULL), choices=FULL)
    parser.add_argument("--full", action="store_true", help="full depth instead of few blocks of full width")
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16 is autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile ours block by block, the peer's blocks as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, {args.dtype}, batch {args.batch}\n")
    for name in args.models:
        a = ours(name, args.full)
        b = peer(sum(p.numel() for p in a.network.parameters()))
        for contender in (a, b):
            contender.network.to(args.device)
        if args.compile:
            a.network.compile_units()  # type: ignore[operator]
            for block in b.network.transformer_blocks:  # type: ignore[union-attr]
                block.compile()
        for mode in args.modes:
            compare(a, b, mode, args)


if __name__ == "__main__":
    main()
