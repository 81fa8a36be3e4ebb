"""`diffzoo describe NAME [key=value ...]`: parameters, multiply-adds, levels, and published weights of a model."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.zoo.manifest import Pretrained

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", help="a registered name, or weights such as adm_256.in1k; `diffzoo list` shows them")
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
    """Print the summary, and what is published of the model."""
    overrides = parse_overrides(args.overrides)
    from diffzoo.models.summary import describe, summarise
    from diffzoo.zoo.manifest import find_pretrained, list_pretrained

    model, _, tag = args.name.partition(".")
    if tag:
        known = find_pretrained(args.name).metadata
        summary = summarise(args.name, known.network, known.config.override(**overrides))
    else:
        summary = describe(model, **overrides)
    weights = [find_pretrained(name) for name in list_pretrained(model) if not tag or name == args.name]
    if args.json:
        published = {"weights": [_published(item) for item in weights]} if weights else {}
        print(json.dumps({**summary.to_dict(), **published}, indent=2))
        return 0
    print(summary)
    for item in weights:
        print(_text(item))
    return 0


def _published(item: "Pretrained") -> dict[str, Any]:
    """What is known of a set of weights, as JSON-ready data."""
    from diffzoo.record import to_plain

    known = item.metadata.to_plain()
    return {
        "name": item.name,
        "source": str(item.source),
        "pinned": item.sha256 is not None,
        "weights_licence": item.metadata.licence,
        **{key: known.get(key, {}) for key in ("sampler", "guidance", "presets")},
        "published": to_plain(item.published, sparse=True),
    }


def _text(item: "Pretrained") -> str:
    data = _published(item)
    lines = [f"\nweights {item.name}: {item.source}", f"  licence   {data['weights_licence']}"]
    lines += [f"  {key:<9} {json.dumps(data[key])}" for key in ("sampler", "guidance") if data[key]]
    lines += [f"  preset    {name}: {json.dumps(preset)}" for name, preset in data["presets"].items()]
    rows: dict[str, list[str]] = {}
    for row in item.published:
        preset = f" (--preset {row.preset})" if row.preset else ""
        rows.setdefault(f"{row.protocol}{preset}", []).append(f"{row.metric} {row.value:g}")
    lines += [f"  published {', '.join(values)}: {protocol}" for protocol, values in rows.items()]
    return "\n".join(lines)
