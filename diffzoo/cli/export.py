"""`diffzoo export RUN FILE`: weights in one file, for diffzoo, or for programs without it."""

import argparse
from pathlib import Path

from diffzoo.errors import UserError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="run directory, .ckpt, .safetensors, folder in published form, or a name")
    parser.add_argument("file", help="where they go: my_model.safetensors, my_model.onnx, my_model.pt2, or a folder")
    parser.add_argument(
        "--format",
        default="safetensors",
        choices=["safetensors", "onnx", "pt2", "diffusers"],
        help="safetensors (default), which diffzoo loads; onnx or pt2 (torch.export): a function from noisy to clean "
        "images, with the process inside, in float32; diffusers: the folder of a DiTPipeline",
    )
    parser.add_argument("--compiled", action="store_true", help="with pt2: compile for this machine (AOTInductor)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="in the file (default: fp32)")
    parser.add_argument("--licence", "--license", help="licence of the weights; no default")
    parser.add_argument("--weights", default="ema", help="ema (default), raw, or the label of an EMA")
    parser.add_argument("--guidance", type=float, help="strength that becomes the default, 1 = none")


def run(args: argparse.Namespace) -> int:
    """Write the file; print its size and hash."""
    from diffzoo.sampling import Guidance
    from diffzoo.zoo.export import export

    if args.format != "safetensors":
        return _portable(args)
    guidance = None if args.guidance is None else Guidance(args.guidance)
    options = {"dtype": args.dtype, "licence": args.licence, "weights": args.weights}
    print(export(args.source, args.file, guidance=guidance, **options))
    return 0


def _portable(args: argparse.Namespace) -> int:
    """Write a file that needs no diffzoo, and say how it is called."""
    from diffzoo import portable
    from diffzoo.generation import pipeline

    ending = {"onnx": ".onnx", "pt2": ".pt2", "diffusers": ""}[args.format]
    path = Path(args.file)
    if path.suffix != ending:
        raise UserError(f"expected a {f'file that ends in {ending}' if ending else 'folder'}, got {path}")
    if args.dtype != "fp32" or args.guidance is not None or args.licence is not None:
        raise UserError(
            "--dtype, --guidance and --licence belong to safetensors: the other formats take the weights as is"
        )
    pipe = pipeline(args.source, "cpu", weights=args.weights)
    if args.format == "onnx":
        print(portable.export_onnx(pipe, path))
    elif args.format == "pt2":
        print(portable.export_pt2(pipe, path, args.compiled))
    else:
        print(portable.export_diffusers(pipe, path))
    return 0
