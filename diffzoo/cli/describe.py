"""`diffzoo describe NAME [key=value ...]`: parameters, multiply-adds and levels of a model; its weights, classes."""

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffzoo.zoo import Metadata, Pretrained

__all__ = ["configure", "run"]

SHOWN = 20  # class names


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", help="of a model, or weights: adm_256.in1k, a run, a file, hf-hub:owner/name")
    overrides = 'rewrites of the config, for example num_classes=10 dropout=0.2 "depth_at={16: 8}"'
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the summary, and what is known of the weights."""
    from diffzoo.models import is_model
    from diffzoo.models.summary import describe, summarise
    from diffzoo.recipe.parse import parse_overrides
    from diffzoo.zoo.manifest import find_pretrained, list_pretrained

    overrides = parse_overrides(args.overrides)
    if is_model(args.name) and "." not in args.name:
        summary = describe(args.name, **overrides)
        weights = [_published(find_pretrained(name)) for name in list_pretrained(args.name)]
    else:
        if is_model(args.name):
            item = find_pretrained(args.name)
            known, weights = item.metadata, [_published(item)]
        else:
            known = _found(args.name)
            weights = [_known(known, args.name, str(known.provenance))]
        summary = summarise(args.name, known.network, known.config.override(**overrides))
    if args.json:
        print(json.dumps({**summary.to_dict(), **({"weights": weights} if weights else {})}, indent=2))
        return 0
    print(summary)
    for each in weights:
        print(_text(each))
    return 0


def _found(source: str) -> "Metadata":
    """The metadata of a run, a file or a repository of the Hub."""
    from diffzoo.factory import is_source
    from diffzoo.models import entry
    from diffzoo.zoo import locate

    if not is_source(source):
        entry(source)  # raises, and names the nearest
    return locate(source).metadata


def _known(metadata: "Metadata", name: str, source: str) -> dict[str, object]:
    """What is known of a set of weights, as JSON-ready data."""
    from diffzoo.zoo import class_list

    plain = metadata.to_plain()
    return {
        "name": name,
        "source": source,
        "weights_licence": metadata.licence,
        **{key: plain.get(key, {}) for key in ("process", "sampler", "guidance", "presets")},
        "class_names": list(class_list(metadata.class_names)),
    }


def _published(item: "Pretrained") -> dict[str, object]:
    from diffzoo.record import to_plain

    known = _known(item.metadata, item.name, str(item.source))
    return {**known, "pinned": item.sha256 is not None, "published": to_plain(item.published, sparse=True)}


def _text(data: Mapping[str, Any]) -> str:
    lines = [f"\nweights {data['name']}: {data['source']}", f"  licence   {data['weights_licence'] or 'not stated'}"]
    lines += [f"  {key:<9} {json.dumps(data[key])}" for key in ("sampler", "guidance") if data[key]]
    lines += [f"  preset    {name}: {json.dumps(preset)}" for name, preset in data["presets"].items()]
    if names := data["class_names"]:
        rest = f", ... {len(names)} in all, which --json prints" if len(names) > SHOWN else ""
        lines.append("  classes   " + ", ".join(f"{i} {name}" for i, name in enumerate(names[:SHOWN])) + rest)
    rows: dict[str, list[str]] = {}
    for row in data.get("published", ()):
        preset = f" (--preset {row['preset']})" if row.get("preset") else ""
        rows.setdefault(f"{row['protocol']}{preset}", []).append(f"{row['metric']} {row['value']:g}")
    lines += [f"  published {', '.join(values)}: {protocol}" for protocol, values in rows.items()]
    return "\n".join(lines)
