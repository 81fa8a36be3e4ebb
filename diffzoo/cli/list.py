"""`diffzoo list`: names of the registered models and what each takes."""

import argparse
import fnmatch
import json

from diffzoo.errors import UserError, did_you_mean

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help='shell pattern such as "simple_*"; all by default')
    parser.add_argument("--kind", choices=("denoiser", "classifier"), default="denoiser", help="default: denoiser")
    parser.add_argument("--json", action="store_true", help="print a JSON object from name to input and classes")


def run(args: argparse.Namespace) -> int:
    """Print one name per line."""
    from diffzoo.models import entry, list_models

    known = list_models(kind=args.kind)
    names = fnmatch.filter(known, args.pattern)
    if not names:
        raise UserError(f"no model matches {args.pattern!r}{did_you_mean(args.pattern, known)}")
    configs = {name: entry(name).config for name in names}
    inputs = {name: [c.in_channels, c.image_size, c.image_size] for name, c in configs.items()}
    if args.json:
        shown = {n: {"input": inputs[n], "classes": configs[n].num_classes} for n in names}
        print(json.dumps(shown, indent=2))
        return 0
    width = max(map(len, names))
    for name in names:
        size = " x ".join(map(str, inputs[name]))
        print(
            f"{name:<{width}}  {size}" + (f", {configs[name].num_classes} classes" if configs[name].num_classes else "")
        )
    return 0
