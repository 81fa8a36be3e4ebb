"""`diffzoo list`: names of the registered models, what each takes, and the published weights."""

import argparse
import json
import re
import shutil
import sys
from typing import TYPE_CHECKING

from diffzoo.errors import UserError, did_you_mean
from diffzoo.sizes import size_text

if TYPE_CHECKING:
    from diffzoo.zoo import Pretrained

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pattern", nargs="*", help='of models or weights, such as "simple_*" "*emoji*"; default: all')
    parser.add_argument("--pretrained", action="store_true", help="list the published weights, with FID and licence")
    parser.add_argument("--kind", choices=("denoiser", "classifier"), default="denoiser", help="default: denoiser")
    parser.add_argument("--json", action="store_true", help="print a JSON object by name")


def run(args: argparse.Namespace) -> int:
    """Print one name per line."""
    from diffzoo.factory import get_pretrained_cfg, list_models
    from diffzoo.models import entry

    weights = list_models(args.pattern, pretrained=True, kind=args.kind)
    models = sorted({*list_models(args.pattern, kind=args.kind), *(name.split(".", 1)[0] for name in weights)})
    if not (weights if args.pretrained else models):
        known = [*list_models(kind=args.kind), *list_models(pretrained=True, kind=args.kind)]
        what = "published weights match" if args.pretrained else "model matches"
        asked = " ".join(args.pattern)
        inside = f"; did you mean '*{asked}*'?" if any(asked in name for name in known) else ""
        raise UserError(f"no {what} {asked!r}{inside or did_you_mean(asked, known) or '; `diffzoo list` shows all'}")
    if args.pretrained:
        return _table([_weights_row(get_pretrained_cfg(name)) for name in weights], args.json)
    tags: dict[str, list[str]] = {name: [] for name in models}
    for model, _, tag in (name.partition(".") for name in list_models(models, pretrained=True, kind=args.kind)):
        tags[model].append(tag)
    shown = {}
    for name, config in ((name, entry(name).config) for name in models):
        size = [config.in_channels, *config.sides]
        shown[name] = {"input": size, "classes": config.num_classes, "weights": tags[name]}
        takes = " x ".join(map(str, size)) + (f", {config.num_classes} classes" if config.num_classes else "")
        takes += f"; weights: {', '.join(tags[name])}" if tags[name] else ""
        if not args.json:
            print(f"{name:<{max(map(len, models))}}  {takes}")
    if args.json:
        print(json.dumps(shown, indent=2))
    return 0


def _weights_row(item: "Pretrained") -> dict[str, str | float | None]:
    config, latent = item.config, item.config.in_channels != 3
    numbers = re.findall(r"_(\d+)", item.model)  # the last one is the size of the images
    return {
        "name": item.name,
        "family": item.metadata.network.__name__,
        "resolution": numbers[-1] if latent and numbers else size_text(config.image_size),
        "space": " x ".join(map(str, (f"latent {config.in_channels}", *config.sides))) if latent else "pixels",
        "FID": next((row.value for row in item.published if row.metric == "FID"), None),
        "licence": item.metadata.licence,
    }


def _table(rows: list[dict[str, str | float | None]], as_json: bool) -> int:
    """Print the rows; lines are cut at the width of a terminal, where there is one."""
    if as_json:
        print(json.dumps({str(row.pop("name")): row for row in rows}, indent=2))
        return 0
    head = ["name", "family", "px", "space", "FID", "licence"]
    lines = [head, *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = shutil.get_terminal_size((sys.maxsize, 0)).columns
    for line in lines:
        text = "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        print(text if len(text) <= room else f"{text[: room - 1]}…")
    return 0


def _text(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "-" if value is None else value.partition(" ")[0] if value.startswith("latent") else value
