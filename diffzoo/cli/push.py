"""`diffzoo push RUN_OR_CKPT owner/name`: publish a model on the Hub."""

import argparse

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="run directory, .ckpt, .safetensors, folder in published form, or a name")
    parser.add_argument("repo", help="owner/name on the Hub, made if needed")
    parser.add_argument("--licence", "--license", help="licence of the weights, for example cc-by-4.0; no default")
    parser.add_argument("--dataset", help="what it was trained on, for the card; default: what the recipe says")
    parser.add_argument("--weights", default="ema", help="ema (default), raw, or the label of an EMA")
    results = "results of `diffzoo eval` for the card"
    parser.add_argument("--evaluation", dest="evaluations", nargs="+", default=[], metavar="RESULT", help=results)
    parser.add_argument("--merge", action="store_true", help="publish whole weights, not low-rank adapters alone")
    parser.add_argument("--private", action="store_true", help="in a private repository; a public one is refused")
    parser.add_argument("--revision", help="branch to commit to, made if needed")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, with sizes and hashes")


def run(args: argparse.Namespace) -> int:
    """Publish, and print the address of the commit."""
    from diffzoo.zoo.publish import push_to_hub

    print(push_to_hub(**{name: value for name, value in vars(args).items() if name != "settings"}))
    return 0
