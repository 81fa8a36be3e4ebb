"""`diffzoo demo [SOURCE ...]`: a page in the browser that samples from models, runs and files."""

import argparse
import os
import sys
import time
from pathlib import Path

from diffzoo.cli.sample import SHIPPED
from diffzoo.errors import MissingExtraError, UserError

__all__ = ["configure", "run"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    sources = "published names, runs or files; default: the small model that ships and the runs below ./runs"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=sources)
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: for this machine alone")
    parser.add_argument("--password", help="ask visitors for it; the user is called diffzoo")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from diffzoo.demo.page import Models, serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise MissingExtraError("gradio", "demo", "the demo page") from error
    from diffzoo.generation import device_of

    device_of(args.device)
    sources = args.sources or [SHIPPED, *_runs()]
    models = Models(sources, args.device)
    models(sources[0])  # what is wrong with it is said here
    if args.host not in LOOPBACK:
        guarded = "who knows the password" if args.password else "who can reach this machine"
        print(f"diffzoo: warning: the page is open to everybody {guarded}, on {args.host}", file=sys.stderr)
    try:
        page = serve(models, args.host, args.port, args.password)
    except (OSError, OverflowError) as error:  # a port beyond 65535
        raise UserError(f"the page cannot be served on {args.host}: {error}") from error
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()


def _runs() -> list[str]:
    """Folders of runs below ./runs, the newest first."""
    from diffzoo.runs import newest_checkpoint

    found = [path for path in Path("runs").glob("*") if path.is_dir() and newest_checkpoint(path)]
    return [str(path) for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]
