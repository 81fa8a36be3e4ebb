"""`diffzoo verify NAME`: prove that a published checkpoint is the original."""

import argparse
import json
from dataclasses import asdict

from diffzoo.errors import UserError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("name", help="published weights, such as dimr_xl_256 or dimr_xl_256.in1k")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """0 if the checkpoint is what it should be, 1 if not; a file that cannot be had is an error, status 2."""
    from diffzoo.zoo.verify import Report, unverified, verify

    def as_json(report: Report) -> str:
        return json.dumps(asdict(report), indent=2, ensure_ascii=False)

    try:
        report = verify(args.name)
    except UserError as error:
        if args.json:  # for the program that reads it; the sentence follows for people
            print(as_json(unverified(args.name, str(error))))
        raise
    print(as_json(report) if args.json else report)
    return 0 if report.ok else 1
