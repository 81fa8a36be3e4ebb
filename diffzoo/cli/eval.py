"""`diffzoo eval MODEL --protocol P`, `diffzoo eval --images A --reference B`, `diffzoo eval compare A.json B.json`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.cli.eval_options import (
    default_out,
    feature_weights,
    open_model,
    plan_arguments,
    read_protocol,
    run_options,
    shared_arguments,
)
from diffzoo.errors import UserError
from diffzoo.runs import is_first_process

if TYPE_CHECKING:
    from diffzoo.evaluation import Result

__all__ = ["check_ready", "configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("target", nargs="*", help="a model; or: compare RESULT.json RESULT.json")
    shared_arguments(parser)
    plan_arguments(parser)
    parser.add_argument("--weights", help="of a checkpoint: ema (default), raw, or a label")
    parser.add_argument("--images", help="evaluate a folder of images or an .npz file instead of a model")
    parser.add_argument("--held-out", metavar="FOLDER_OR_NPZ", help="held-out real images, which Fréchet ratios need")
    parser.add_argument("--metrics", nargs="+", help="instead of the protocol's, which makes another protocol")
    parser.add_argument("--keep-images", action="store_true", help="keep the images, as OUT/samples.npz")
    parser.add_argument("--memorisation", metavar="FOLDER_OR_NPZ", help="look for copies of these training images")


def run(args: argparse.Namespace) -> int:
    """Evaluate or compare, and print the values."""
    if args.target[:1] == ["compare"]:
        return _compare(args.target[1:])
    if len(args.target) + bool(args.images) != 1:
        raise UserError("expected one model, or --images FOLDER_OR_NPZ, or: compare RESULT.json RESULT.json")
    protocol = read_protocol(args)
    from diffzoo.evaluation import evaluate
    from diffzoo.evaluation.demo import open_reference
    from diffzoo.evaluation.image_files import open_images
    from diffzoo.evaluation.run import result_path
    from diffzoo.generation import device_of

    device = str(device_of(args.device))
    args.out = args.out or default_out(args.images or args.target[0])
    source = open_images(args.images) if args.images else open_model(args, device, args.weights)
    if protocol.name == "folders" and args.n is None and args.images:
        protocol = replace(protocol, n=len(open_images(args.images)))  # all of them
    protocol, reference = open_reference(protocol, args.reference, source.image_size)
    options = run_options(args, device, keep_images=args.keep_images or bool(args.memorisation))
    held_out = open_images(args.held_out) if args.held_out else None
    result = evaluate(source, protocol, reference, options, held_out)
    if not is_first_process():
        return 0
    print(result.table())
    for remark in result.remarks:
        print(f"note: {remark}")
    path = result_path(args.out, result.plan, result.protocol)
    print(f"{path}: protocol {result.protocol.sha256[:16]}")
    if args.memorisation:
        _memorisation(args, result, device)
    return 0


def check_ready(words: Sequence[str]) -> None:
    """Look whether `diffzoo eval` with these arguments will find what it needs besides the model.

    Raises:
        UserError: for a wrong option, a reference or weights of feature networks that are not there, or too few images.
    """
    from diffzoo.cli.main import Parser
    from diffzoo.evaluation.checks import check_count
    from diffzoo.evaluation.demo import is_made
    from diffzoo.evaluation.image_files import open_images
    from diffzoo.evaluation.reference import find_reference
    from diffzoo.evaluation.run import load_networks

    parser = Parser(prog="diffzoo eval", allow_abbrev=False)
    configure(parser)
    args = parser.parse_args(words)
    protocol = read_protocol(args)
    if not is_made(protocol, args.reference):
        find_reference(protocol.reference, args.reference)
    if args.held_out:
        open_images(args.held_out)
    check_count(protocol, load_networks(protocol.metrics, feature_weights(args)), args.few)


def _compare(paths: list[str]) -> int:
    from diffzoo.evaluation import Result, compare

    if len(paths) != 2:
        raise UserError(f"compare needs two results, got {len(paths)}: diffzoo eval compare A.json B.json")
    print(compare(Result.load(paths[0]), Result.load(paths[1]), (paths[0], paths[1])))
    return 0


def _memorisation(args: argparse.Namespace, result: "Result", device: str) -> None:
    from diffzoo.evaluation.image_files import NpzImages, open_images
    from diffzoo.evaluation.memorisation import report

    network = result.protocol.networks[0].name
    found = report(
        NpzImages(str(Path(args.out) / "samples.npz")),
        open_images(args.memorisation),
        network,
        Path(args.out) / "memorisation",
        weights=feature_weights(args).get(network),
        device=device,
    )
    print(found.summary())
