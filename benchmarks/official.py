"""Networks against their authors' own codes: the same weights, inputs and precision, in one process.

    git clone https://github.com/qihao067/DiMR && git clone https://github.com/baofff/U-ViT
    git clone https://github.com/facebookresearch/DiT && git clone https://github.com/willisma/SiT
    git clone https://github.com/LTH14/JiT && git clone https://github.com/NVlabs/edm2
    git clone https://github.com/openai/guided-diffusion
    python benchmarks/official.py --dimr DiMR --uvit U-ViT                      # five blocks a stage, a few minutes
    python benchmarks/official.py --dimr DiMR --uvit U-ViT --full               # the published depths
    python benchmarks/official.py --dimr DiMR --full --dtype bf16 --modes train --compile
    python benchmarks/official.py --uvit U-ViT --full --device cuda --dtype bf16 --batch 32 --compile
    python benchmarks/official.py --dit DiT --sit SiT --edm2 edm2 --modes train
    python benchmarks/official.py --adm guided-diffusion --batch 2              # and diffusers' network of this shape
    TORCHDYNAMO_DISABLE=1 python benchmarks/official.py --jit JiT --modes train      # both without the compiler
    python benchmarks/official.py --jit JiT --modes train --compile                  # both with it

Random weights, drawn by the official code, go through the converter that published checkpoints go through; before
anything is timed the two outputs must agree. Both run on one image per turn (`--batch`), taking turns in an order that
alternates; printed are medians over `--rounds` and the median of the ratios ours / official. One round more warms up.

    forward         no gradients, evaluation mode
    train           forward, sum of the mean squares of all outputs, backward; no optimizer
    --dtype bf16    both under autocast; forward also with our weights stored in bfloat16
    --compile       ours block by block (`compile_units`); the official code runs as it is published
    --recompute     the official U-ViT with its recomputation (`use_checkpoint=True`), as its authors trained it

DiMR's official blocks always recompute in training, and JiT's are always compiled. Reduced, EDM2 and ADM keep their
four levels with one block each. `UNet2DModel` of diffusers has ADM's blocks but other weights and fewer operations, so
its ratio is of the time per FLOP. On CUDA ratios are of wall time after a synchronisation; on a CPU
of one thread (OMP_NUM_THREADS=1) of the process's own time, which other programs disturb little. On a CPU the process
keeps the memory that it frees, as in `diffzoo fit`, for both sides; `--default-malloc` leaves that to the C library,
and then what ran before decides how fast a pass is. Needs einops, timm and ml_collections, as the official codes do.
"""

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from official_configs import dimr_config, dit_config, uvit_config
from torch.utils.flop_counter import FlopCounterMode

from diffzoo.models import Network, entry
from diffzoo.models.adm import ADMConfig, ADMUNet
from diffzoo.models.dimr import DiMR
from diffzoo.models.dit import DiT, DiTConfig
from diffzoo.models.edm2 import EDM2Config, EDM2UNet
from diffzoo.models.uvit_bao import UViTBao
from diffzoo.training.host_memory import keep_freed_memory
from diffzoo.typing import Condition
from diffzoo.zoo.converters import dimr as dimr_converter
from diffzoo.zoo.converters import dit as dit_converter
from diffzoo.zoo.converters import edm2 as edm2_converter
from diffzoo.zoo.converters import guided_diffusion
from diffzoo.zoo.converters import uvit_bao as uvit_converter

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
WIDTHS = {"uvit_bao_l_256": (1024, 20), "uvit_bao_h_256": (1152, 28)}
MODELS = ["dimr_xl_256", *WIDTHS, "dit_xl_256", "sit_xl_256", "jit_b_256", "edm2_s_64", "adm_64", "adm_64:diffusers"]


class Side(NamedTuple):
    """A network, how it is called on (images or latents, times in [0, 1], labels), and the shape of an image.

    `gflops` of an image are given where the two sides do not compute the same.
    """

    network: nn.Module
    call: Call
    shape: tuple[int, int, int] = (4, 32, 32)
    gflops: float = 1.0


# -- the two sides


@contextlib.contextmanager
def imports_from(folder: Path) -> Any:
    """Import from a clone; several codes have modules of one name, so what was imported is forgotten afterwards."""
    sys.path.insert(0, str(folder.resolve()))
    before = set(sys.modules)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in set(sys.modules) - before:
            if str(folder.resolve()) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]


def dimr(name: str, clone: Path, depth: int | None) -> tuple[Side, Side]:
    """The official DiMR of a published configuration and ours with its weights."""
    assert name == "dimr_xl_256"
    with imports_from(clone):
        arguments = importlib.import_module("configs.DiMR-XL-2R_imagenet256").model
        for stage in arguments.stage_configs if depth else ():
            stage.num_blocks = depth
        official = importlib.import_module("libs.core.blocks").MRModel(arguments)
    fields = {k: v for k, v in vars(arguments).items() if k != "stage_configs"}
    added = ("num_classes", "pe_type", "norm_type")  # what the official constructor writes into its stages
    stages = [vars(stage) for stage in arguments.stage_configs]
    fields["stage_configs"] = [{k: v for k, v in stage.items() if k not in added} for stage in stages]
    stirred(official)
    ours = DiMR(dimr_config(fields))
    ours.load_state_dict(dimr_converter.from_official(official.state_dict(), ours.config))

    def call_ours(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        condition = Condition(label=label)
        if ours.training:
            return ours.training_outputs(z, 8 * t - 4, condition)
        return (ours(z, 8 * t - 4, condition),)

    def call_official(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        outputs = official(z, log_snr=8 * t - 4, y=label)
        return tuple(outputs) if ours.training else (outputs[-1],)

    return Side(ours, call_ours), Side(official, call_official)


def uvit(name: str, clone: Path, depth: int | None, recompute: bool) -> tuple[Side, Side]:
    """The official U-ViT of a published configuration and ours with its weights."""
    width, full = WIDTHS[name]
    arguments = {"img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": width, "depth": depth or full,
                 "num_heads": 16, "mlp_ratio": 4, "qkv_bias": False, "mlp_time_embed": False, "num_classes": 1001,
                 "use_checkpoint": recompute, "conv": False}  # fmt: skip
    with imports_from(clone):
        official = importlib.import_module("libs.uvit").UViT(**arguments)
    config = uvit_config(arguments)
    ours = UViTBao(config)
    ours.load_state_dict(uvit_converter.from_official(official.state_dict(), config))

    def call_ours(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (ours(z, 1000 * t, Condition(label=label)),)

    def call_official(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (official(z, 1000 * t, label),)

    return Side(ours, call_ours), Side(official, call_official)


def stirred(network: nn.Module) -> nn.Module:
    """The network after a step away from its first weights: gates start at zero, where half of it has no gradient."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def transformer(name: str, clone: Path, depth: int | None) -> tuple[Side, Side]:
    """The official DiT, SiT or JiT of a published size and ours with its weights."""
    family = {"dit": "DiT", "sit": "SiT", "jit": "JiT"}[name.split("_")[0]]
    published = entry(name).config
    assert isinstance(published, DiTConfig)
    c = published.override(depth=depth or published.depth)
    arguments = {"input_size": c.image_size, "patch_size": c.patch, "in_channels": c.in_channels, "depth": c.depth,
                 "hidden_size": c.width, "num_heads": c.heads, "num_classes": c.num_classes}  # fmt: skip
    if family == "JiT":
        arguments |= {"bottleneck_dim": c.bottleneck, "in_context_len": c.context_tokens,
                      "in_context_start": c.context_start}  # fmt: skip
    if not torch.cuda.is_available():  # JiT's code moves its tables to the GPU as it makes them
        nn.Module.cuda = torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign, assignment]
    with imports_from(clone):
        module = importlib.import_module("model_jit" if family == "JiT" else "models")
        official = stirred(getattr(module, "JiT" if family == "JiT" else family)(**arguments))
    ours = DiT(dit_config(arguments, family))
    ours.load_state_dict(dit_converter.from_official(official.state_dict(), ours.config))
    scale = 999.0 if family == "DiT" else 1.0

    def call_ours(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (ours(z, scale * t, Condition(label=label)),)

    def call_official(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (official(z, scale * t, label),)

    shape = (c.in_channels, c.image_size, c.image_size)
    return Side(ours, call_ours, shape), Side(official, call_official, shape)


def edm2(name: str, clone: Path, depth: int | None) -> tuple[Side, Side]:
    """The official EDM2 network of a published size and ours with its weights."""
    published = entry(name).config
    assert isinstance(published, EDM2Config)
    c = published.override(uncertainty=False, dropout=0.0)
    if depth:
        c = c.override(depth_at={level.resolution: 1 for level in c.levels})
    with imports_from(clone):
        build = importlib.import_module("training.networks_edm2").UNet
        width, blocks = c.levels[0].width, c.levels[0].depth
        official = stirred(build(c.image_size, c.in_channels, c.num_classes, model_channels=width, num_blocks=blocks))
    ours = EDM2UNet(c)
    ours.load_state_dict(edm2_converter.from_official({f"unet.{k}": v for k, v in official.state_dict().items()}, c))

    def call_ours(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (ours(z, t, Condition(label=label)),)

    def call_official(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (official(z, t, nn.functional.one_hot(label, c.num_classes).float()),)

    shape = (c.in_channels, c.image_size, c.image_size)
    return Side(ours, call_ours, shape), Side(official, call_official, shape)


def adm_network(depth: int | None) -> ADMUNet:
    """ADM at 64 px, its zeros stirred, without dropout; reduced, with one block a level."""
    published = entry("adm_64").config
    assert isinstance(published, ADMConfig)
    c = published.override(dropout=0.0)
    network = ADMUNet(c.override(depth_at={level.resolution: 1 for level in c.levels}) if depth else c)
    stirred(network)
    return network


def adm(name: str, clone: Path, depth: int | None) -> tuple[Side, Side]:
    """ADM at 64 px, and guided-diffusion's or diffusers' network of its shape."""
    ours = adm_network(depth)
    c, size = ours.config, ours.config.sides[0]
    shape = (c.in_channels, size, size)

    def call_ours(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (ours(z, 999 * t, Condition(label=label)),)

    if name.endswith("diffusers"):
        from diffusers import UNet2DModel

        other = UNet2DModel(
            size, 3, 2 * 3, block_out_channels=[v.width for v in c.levels], layers_per_block=c.levels[0].depth,
            down_block_types=["AttnDownBlock2D" if v.attention else "DownBlock2D" for v in c.levels],
            up_block_types=["AttnUpBlock2D" if v.attention else "UpBlock2D" for v in reversed(c.levels)],
            attention_head_dim=c.head_channels, norm_num_groups=32, resnet_time_scale_shift="scale_shift",
            downsample_type="resnet", upsample_type="resnet", num_class_embeds=c.num_classes,
        )  # fmt: skip

        def call_other(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
            return (other(z, 999 * t, label).sample,)

        sides = Side(ours, call_ours, shape), Side(other, call_other, shape)
        return tuple(side._replace(gflops=gflops(side)) for side in sides)  # type: ignore[return-value]

    with imports_from(clone):
        build = importlib.import_module("guided_diffusion.unet").UNetModel
        attention = tuple(size // v.resolution for v in c.levels if v.attention)
        multipliers = tuple(v.width // c.base_width for v in c.levels)
        official = build(
            size, 3, c.base_width, 6, c.levels[0].depth, attention, channel_mult=multipliers,
            num_classes=c.num_classes, num_head_channels=c.head_channels, use_scale_shift_norm=True,
            resblock_updown=True, use_new_attention_order=True,
        )  # fmt: skip
    official.load_state_dict(guided_diffusion.to_official(ours.state_dict(), c))

    def call_official(z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (official(z, 999 * t, label),)

    return Side(ours, call_ours, shape), Side(official, call_official, shape)


def gflops(side: Side) -> float:
    """Of one image's forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        side.call(*inputs(1, "cpu", side.shape))
    return float(counter.get_total_flops()) / 1e9


# -- timing


def inputs(batch: int, device: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Images or latents, times, one per image, and labels."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *shape, generator=generator).to(device)
    return z, torch.linspace(0.15, 0.9, batch, device=device), torch.arange(batch, device=device) % 1000


def seconds(side: Side, mode: str, autocast: bool, batch: int, device: str) -> float:
    """One pass."""
    data = inputs(batch, device, side.shape)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    start = clock()
    with torch.autocast(kind, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(mode == "train"):
        outputs = side.call(*data)
        loss = torch.stack([out.float().square().mean() for out in outputs]).sum()
    if mode == "train":
        loss.backward()
    loss.item()  # waits for the accelerator
    taken = clock() - start
    side.network.zero_grad(set_to_none=True)
    return taken


def agreement(ours: Side, official: Side, device: str) -> float:
    """The largest difference of the outputs over their largest value, in float32."""
    with torch.no_grad():
        data = inputs(2, device, ours.shape)
        pairs = list(zip(ours.call(*data), official.call(*data), strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def compare(title: str, ours: Side, official: Side, mode: str, autocast: tuple[bool, bool], args: Any) -> None:
    """Take turns, print medians."""
    rounds = []
    for i in range(args.rounds + 1):
        sides = [(0, ours), (1, official)]
        times = {}
        for which, side in sides if i % 2 else sides[::-1]:
            times[which] = seconds(side, mode, autocast[which], args.batch, args.device)
        if i:
            rounds.append((times[0], times[1]))
    mine, theirs = (1e3 * statistics.median(column) / args.batch for column in zip(*rounds, strict=True))
    ratios = sorted(a / b * official.gflops / ours.gflops for a, b in rounds)
    print(
        f"{title:<44} {mine:9.1f} {theirs:9.1f} ms/image   ratio {statistics.median(ratios):.3f}"
        f"   ({ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )


def measure(name: str, ours: Side, official: Side, args: Any) -> None:
    """All modes of one model."""
    for side in (ours, official):
        side.network.to(args.device).eval()
    same = ours.gflops == official.gflops
    worst = agreement(ours, official, args.device) if same else 0.0
    millions = sum(p.numel() for p in ours.network.parameters()) / 1e6
    how = f"outputs agree to {worst:.1e}" if same else f"{ours.gflops:.1f} against {official.gflops:.1f} GFLOPs"
    print(f"{name}: {millions:.1f} M parameters, {how}", flush=True)
    if worst > 1e-3:
        sys.exit("the two do not compute the same: nothing is timed")
    assert isinstance(ours.network, Network)
    if args.compile:
        ours.network.compile_units()
    low = args.dtype == "bf16"
    for mode in args.modes:
        for side in (ours, official):
            side.network.train(mode == "train")
        compare(f"  {mode}, {args.dtype}{' autocast' * low}", ours, official, mode, (low, low), args)
    if low and "forward" in args.modes:
        for side in (ours, official):
            side.network.eval()
        ours.network.to(torch.bfloat16)
        compare("  forward, our weights in bf16", ours, official, "forward", (False, True), args)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimr", type=Path, help="a clone of github.com/qihao067/DiMR")
    parser.add_argument("--uvit", type=Path, help="a clone of github.com/baofff/U-ViT")
    parser.add_argument("--dit", type=Path, help="a clone of github.com/facebookresearch/DiT")
    parser.add_argument("--sit", type=Path, help="a clone of github.com/willisma/SiT")
    parser.add_argument("--jit", type=Path, help="a clone of github.com/LTH14/JiT")
    parser.add_argument("--edm2", type=Path, help="a clone of github.com/NVlabs/edm2")
    parser.add_argument("--adm", type=Path, help="a clone of github.com/openai/guided-diffusion")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--full", action="store_true", help="the published depths, not five blocks a stage")
    parser.add_argument("--modes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--default-malloc", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # the official code warns about every time-dependent parameter
    if not args.default_malloc:
        keep_freed_memory()
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, batch {args.batch}{', ours compiled' * args.compile}")
    depth = None if args.full else 5
    for name in args.models:
        torch.manual_seed(0)
        family = name.split("_")[0]
        clone = getattr(args, family)
        if clone is None:
            continue
        builders = {"dimr": dimr, "uvit": partial(uvit, recompute=args.recompute), "edm2": edm2, "adm": adm}
        pair = builders.get(family, transformer)(name, clone, depth)
        measure(name, *pair, args)


if __name__ == "__main__":
    main()
