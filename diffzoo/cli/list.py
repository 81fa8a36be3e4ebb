"""`diffzoo list`: names of the registered models, from an index, without importing torch."""

import argparse
import fnmatch
import json
from importlib.metadata import entry_points
from typing import Literal

from diffzoo.cli.names import INDEX
from diffzoo.errors import UserError, did_you_mean

__all__ = ["configure", "known_models", "run"]

Kind = Literal["denoiser", "classifier"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help='shell pattern such as "simple_*"; all by default')
    parser.add_argument("--kind", choices=("denoiser", "classifier"), default="denoiser", help="default: denoiser")
    parser.add_argument("--json", action="store_true", help="print a JSON object from name to number of parameters")


def known_models(kind: Kind = "denoiser") -> dict[str, int | None]:
    """Names and numbers of parameters. Models of third-party packages, if there are any, have no number here."""
    counts = INDEX[kind]
    if not entry_points(group="diffzoo.models"):
        return dict(counts)
    from diffzoo.models import list_models

    return {name: counts.get(name) for name in list_models(kind=kind)}


def run(args: argparse.Namespace) -> int:
    """Print one name per line."""
    known = known_models(args.kind)
    names = fnmatch.filter(sorted(known), args.pattern)
    if not names:
        raise UserError(f"no model matches {args.pattern!r}{did_you_mean(args.pattern, known)}")
    if args.json:
        print(json.dumps({name: known[name] for name in names}, indent=2))
        return 0
    width = max(map(len, names))
    for name in names:
        count = known[name]
        print(f"{name:<{width}}  {count / 1e6:9.1f} M" if count is not None else name)
    return 0
