"""`diffzoo data`: look at a source, cache latents, compute reference statistics."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.errors import UserError
from diffzoo.sizes import Size, as_size, size_text

if TYPE_CHECKING:
    from diffzoo.data.base import ImageDataModule
    from diffzoo.data.batches import RawBatch, Transform
    from diffzoo.data.inspect import Report
    from diffzoo.data.sources import Source
    from diffzoo.encoders import Identity, KLAutoencoder

__all__ = ["configure", "run"]

CACHE_METADATA = "passport.json"  # of latents, whose module takes long to import
USUAL: dict[str, object] = {"config": None, "revision": None, "split": "train", "download": False}
USUAL |= {"image": "auto", "label": "auto", "caption": "auto"}  # what these flags are if nobody sets them
SOURCE_HELP = "`demo`, a folder of images, a Parquet, tar or zip file, a folder of these, or a Hub name owner/name"


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument("--config", help="configuration of a Hub data set")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub data set")
    parser.add_argument("--split", default="train", help="split to train on (default: train)")
    for kind in ("image", "label", "caption"):
        parser.add_argument(f"--{kind}", default="auto", help=f"{kind} column; `none`: leave out")
    parser.add_argument("--download", action="store_true", help="fetch the files first instead of streaming them")
    parser.add_argument("--size", help="of the images in pixels, 64 or 96x64, height first (default: 64)")
    parser.add_argument("--resize", choices=("adm", "area", "lanczos"), help="default: adm")
    parser.add_argument("--workers", type=int, help="decoding processes (default: by cores)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the three actions."""
    actions = parser.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="count, sizes, columns, classes, licence, speed, contact sheet")
    _common(inspect)
    sheet = inspect.add_mutually_exclusive_group()
    sheet.add_argument("--sheet", type=Path, help="PNG file of the contact sheet (default: SOURCE's name-sheet.png)")
    sheet.add_argument("--no-sheet", action="store_true", help="leave the contact sheet out")
    inspect.add_argument("--sample", type=int, help="how many images to measure (default: 256)")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    encode = actions.add_parser("encode", help="cache latents; run it again to go on, or several times at once")
    _common(encode)
    encode.add_argument("--out", type=Path, required=True, help="folder of the cache")
    encode.add_argument(
        "--autoencoder",
        default="stabilityai/sd-vae-ft-ema",
        help="Hub name, folder, `identity`, or published weights such as lightningdit_xl_256: theirs",
    )
    encode.add_argument("--autoencoder-revision", help="its commit, tag or branch")
    encode.add_argument("--scaling-factor", type=float, default=0.18215)
    encode.add_argument("--buckets", nargs="+", metavar="SIZE", help="aspect buckets of the training images, in pixels")
    encode.add_argument("--batch-size", type=int, default=16, help="images at a time")
    encode.add_argument("--shard-rows", type=int, default=1024, help="images per shard")
    encode.add_argument("--no-flips", action="store_true", help="leave the mirror images out")
    encode.add_argument("--max-bad", type=int, default=100, help="how many bad images may be left out")
    encode.add_argument("--device", help="default: a GPU if there is one")

    stats = actions.add_parser("stats", help="reference statistics for `diffzoo eval`, recorded")
    _common(stats)
    stats.add_argument("--out", type=Path, required=True, help="the .npz file")
    stats.add_argument("--part", choices=("train", "validation"), default="train")
    stats.add_argument("--networks", nargs="+", default=["inception-2015"], help="feature networks")
    stats.add_argument("--limit", type=int, help="stop after this many images")
    stats.add_argument("--keep", type=int, default=10_000, help="images kept for neighbour metrics")
    stats.add_argument("--device", help="default: a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Do one of them."""
    if args.action == "inspect" and next((Path(args.source) / "train").glob(f"**/{CACHE_METADATA}"), None):
        return _inspect_latents(args)
    args.size = as_size("64" if args.size is None else args.size, "--size")
    args.resize = args.resize or "adm"
    return {"inspect": _inspect, "encode": _encode, "stats": _stats}[args.action](args)


def _refuse_given(args: argparse.Namespace, source: str, more: Sequence[str] = ()) -> None:
    """Refuse flags that mean nothing to a source."""
    unset = {**USUAL, **dict.fromkeys(more)}
    given = next((name for name, value in unset.items() if getattr(args, name) != value), None)
    if given:
        raise UserError(f"--{given} means nothing to {source}: leave it out")


def open_data(args: argparse.Namespace) -> "ImageDataModule":
    """The data module of SOURCE, without random choices."""
    from diffzoo.data import DemoData, HFDataset

    # nothing is shown twice, and bad images are counted
    common = {"image_size": args.size, "resize": args.resize, "flip": False, "cache": False}
    common |= {"num_workers": args.workers, "max_bad": sys.maxsize}
    if args.source == "demo":
        _refuse_given(args, "the demo set")
        return DemoData(**common, balance=False)
    label, caption = (None if name == "none" else name for name in (args.label, args.caption))
    common |= {"config": args.config, "revision": args.revision, "split": args.split, "streaming": not args.download}
    data = HFDataset(args.source, image=args.image, label=label, caption=caption, **common)
    print(f"{args.source}: {data.decision}", file=sys.stderr)
    return data


# ---- inspect


def _inspect(args: argparse.Namespace) -> int:
    from diffzoo.data.inspect import contact_sheet, report

    data = open_data(args)
    found = report(data, 256 if args.sample is None else args.sample)
    if not args.no_sheet:
        path = args.sheet or Path(f"{_short_name(args.source)}-sheet.png")
        found["contact sheet"] = str(contact_sheet(data, path))
    return _show(found, args.json)


def _inspect_latents(args: argparse.Namespace) -> int:
    _refuse_given(args, f"{args.source}, which is a cache of latents", ("size", "resize", "sample", "sheet"))
    from diffzoo.data.inspect import latent_report

    return _show(latent_report(Path(args.source), args.workers), args.json)


def _short_name(source: str) -> str:
    """What to call a file about a source."""
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


def _show(report: "Report", as_json: bool) -> int:
    if as_json:
        print(json.dumps(report, indent=1))
        return 0
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{name}:")
            width = max(map(len, value), default=0)
            for key, inner in value.items():
                print(f"  {key:<{width}}  {inner}")
        else:
            print(f"{name}: {value}")
    return 0


# ---- encode


def _device(name: str | None) -> str:
    from diffzoo.generation.generator import device_of

    return str(device_of(name))


def _autoencoder(args: argparse.Namespace) -> "Identity | KLAutoencoder":
    from diffzoo.encoders.autoencoder import Identity, KLAutoencoder
    from diffzoo.zoo.manifest import find_pretrained, is_pretrained

    if args.autoencoder == "identity":
        return Identity()
    if not is_pretrained(args.autoencoder):
        revision = args.autoencoder_revision
        return KLAutoencoder(args.autoencoder, args.scaling_factor, revision, batch_size=args.batch_size)
    spec = find_pretrained(args.autoencoder).metadata.autoencoder
    if spec is None:
        raise UserError(f"{args.autoencoder} samples pixels and has no autoencoder: leave --autoencoder out")
    made = spec.build()
    made.batch_size = args.batch_size
    return made


def _encode(args: argparse.Namespace) -> int:
    from diffzoo.data.encode import encode, make_cache_metadata

    device = _device(args.device)
    autoencoder = _autoencoder(args).to(device)
    data = open_data(args)
    missing = 0
    for part, source, transform in _parts(data, [as_size(size, "--buckets") for size in args.buckets or ()]):
        made = make_cache_metadata(source, transform, 1 if args.no_flips else 2, autoencoder, args.shard_rows)
        limits = (args.batch_size, args.max_bad, _shard_line(part), data.num_workers)
        encoder = lambda images: autoencoder.encode(images.to(device))  # noqa: E731
        done = encode(source, args.out / part, transform, encoder, made, *limits)
        for reason in done.bad.values():
            print(f"left out: {reason}", file=sys.stderr)
        missing += done.elsewhere
        print(
            f"{part}: {done.encoded} shards written, {done.present} were there, "
            f"{done.elsewhere} are being written by other processes"
        )
    if not missing:
        print(f"complete: train with data: {{class_path: diffzoo.data.Latents, init_args: {{path: {args.out}}}}}")
    return 0


def _parts(data: "ImageDataModule", buckets: Sequence[Size]) -> "Iterator[tuple[str, Source, Transform]]":
    """(folder, rows, how they are cropped) of everything that is encoded."""
    if not buckets:
        yield "train", data.train_source, data.transform
    else:
        yield from _by_bucket(data.train_source, buckets, data.transform)
    if data.val_source is not None:
        yield "validation", data.val_source, data.transform


def _by_bucket(
    source: "Source", buckets: Sequence[Size], transform: "Transform"
) -> "Iterator[tuple[str, Source, Transform]]":
    from diffzoo.data.buckets import aspects, nearest
    from diffzoo.data.sources import SubSource

    bucket = nearest(aspects(source), buckets)
    for number, size in enumerate(buckets):
        name, keep = size_text(size), bucket == number
        if keep.any():
            yield f"train/{name}", SubSource(source, keep, f"bucket {name}"), replace(transform, image_size=size)
        else:
            print(f"no image is nearest to {name}: leave it out of the buckets", file=sys.stderr)


def _shard_line(part: str) -> Callable[[int, int], None]:
    def line(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{part}: shard {done} of {total}", end="" if done < total else "\n", file=sys.stderr)

    return line


# ---- stats


def _stats(args: argparse.Namespace) -> int:
    from diffzoo.data.inspect import quiet
    from diffzoo.data.sources import ids_hash
    from diffzoo.evaluation.reference import make_reference
    from diffzoo.files import write_text
    from diffzoo.metrics.features import load_features

    data = open_data(args)
    source = data.train_source if args.part == "train" else data.val_source
    if source is None:
        raise UserError(f"{args.source} has no held-out images: use --part train")
    networks = [load_features(name, device=_device(args.device)) for name in args.networks]
    ids: list[int] = []
    with quiet():
        batches = data.one_pass(args.part)
        reference = make_reference(_first(batches, args.limit, ids), networks, args.out, keep=args.keep)

    record: dict[str, object] = {
        "source": source.name,
        "revision": source.revision,
        "source_fingerprint": source.rows_hash,
    }
    record |= {"image_size": args.size, "resize": args.resize, "licence": source.licence}
    record |= {"part": args.part, "networks": args.networks, "sha256": reference.sha256}
    record |= {"images": len(ids), "ids": ids_hash(ids), "left_out": len(batches.bad)}
    write_text(args.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    left_out = f", {len(batches.bad)} that cannot be decoded left out" if batches.bad else ""
    print(f"{record['images']} images{left_out} in {args.out} (sha256 {reference.sha256[:12]}), a record of it beside")
    return 0


def _first(batches: "Iterable[RawBatch]", limit: int | None, ids: list[int]) -> "Iterator[RawBatch]":
    """The batches up to `limit` images, whose rows are added to `ids`."""
    for batch in batches:
        kept = len(batch["id"]) if limit is None else min(len(batch["id"]), limit - len(ids))
        ids += batch["id"][:kept].tolist()
        yield {name: batch[name][:kept] for name in ("image", "label") if name in batch}
        if len(ids) == limit:
            return
