"""`diffzoo describe NAME [key=value ...]`: parameters, multiply-adds and levels of a model."""

import argparse
import json
from typing import Any

from diffzoo.errors import UserError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", help="a registered name; `diffzoo list` shows them")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help='rewrites of the config, for example num_classes=10 dropout=0.2 "depth_at={16: 8}"',
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`key=value` words as a dict; values are read as YAML."""
    import yaml

    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"expected key=value, got {word!r}")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(
                f"cannot read the value of {word!r}: expected a number, a word or {{pixels: value}}"
            ) from None
    return overrides


def run(args: argparse.Namespace) -> int:
    """Print the summary."""
    overrides = parse_overrides(args.overrides)
    from diffzoo.models.summary import describe

    summary = describe(args.name, **overrides)
    print(json.dumps(summary.to_dict(), indent=2) if args.json else summary)
    return 0
