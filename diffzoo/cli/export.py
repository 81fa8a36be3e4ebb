"""`diffzoo export RUN FILE`: one safetensors file out of a run."""

import argparse

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="run directory, .ckpt, .safetensors, folder in published form, or a name")
    parser.add_argument("file", help="where the weights go, such as my_model.safetensors")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="in the file (default: fp32)")
    parser.add_argument("--licence", "--license", help="licence of the weights; no default")
    parser.add_argument("--weights", default="ema", help="ema (default), raw, or the label of an EMA")
    parser.add_argument("--guidance", type=float, help="strength that becomes the default, 1 = none")


def run(args: argparse.Namespace) -> int:
    """Write the file; print its size and hash."""
    from diffzoo.sampling import Guidance
    from diffzoo.zoo.export import export

    guidance = None if args.guidance is None else Guidance(args.guidance)
    made = export(
        args.source,
        args.file,
        dtype=args.dtype,
        licence=args.licence,
        weights=args.weights,
        guidance=guidance,
    )
    print(made)
    return 0
