"""`diffzoo doctor`: what an issue report needs: versions, devices, precision, caches, and whether the Hub answers."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from diffzoo.environment import environment


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `diffzoo doctor`."""
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub")


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if something that training needs is missing."""
    try:
        found = environment()
    except ImportError as error:
        print(f"torch cannot be imported: {error}", file=sys.stderr)
        return 1
    for name, value in found.items():
        print(f"{name:<16} {value}")
    _places()
    if not args.offline:
        from diffzoo.hub import hub_state

        print(f"{'Hub':<16} {hub_state()}")
    return 0


def _places() -> None:
    from diffzoo.cache import cache_dir, hub_cache_dir

    for name, place in (("cache", cache_dir()), ("Hub cache", hub_cache_dir()), ("here", Path.cwd())):
        existing = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        print(f"{name:<16} {place}, {free:.1f} GiB free{'' if os.access(existing, os.W_OK) else ', not writable'}")
