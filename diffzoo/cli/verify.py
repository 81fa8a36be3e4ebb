"""`diffzoo verify NAME`: prove that a published checkpoint is the original."""

import argparse
import json
from dataclasses import asdict

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("name", help="published weights, such as dimr_xl_256 or dimr_xl_256.in1k")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """0 if the checkpoint is what it should be, 1 if not."""
    from diffzoo.zoo.verify import verify

    report = verify(args.name)
    print(json.dumps(asdict(report), indent=2, ensure_ascii=False) if args.json else report)
    return 0 if report.ok else 1
