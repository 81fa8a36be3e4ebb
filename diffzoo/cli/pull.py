"""`diffzoo pull owner/name`: fetch a model from the Hub."""

import argparse

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("repo", help="owner/name on the Hub")
    parser.add_argument("folder", nargs="?", help="where the files go; default: they stay in the Hub's cache")
    parser.add_argument("--revision", help="branch, tag or commit")


def run(args: argparse.Namespace) -> int:
    """Fetch, and print the folder."""
    from diffzoo.zoo.publish import pull

    print(pull(args.repo, args.folder, args.revision))
    return 0
