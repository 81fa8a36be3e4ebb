"""`diffzoo report RUN [RUN ...]`: one HTML file about a run, or about several side by side."""

import argparse
from pathlib import Path

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, help="the file; default: report.html in the first run")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    from diffzoo.report import write_report

    print(f"report: {write_report(args.runs, args.out or args.runs[0] / 'report.html')}")
    return 0
