"""Check `checkpoints.yaml` thoroughly: what a reader of one entry cannot see, or does not need to.

    python tools/check_manifest.py [FILE]

Types, fields and names of classes are checked by the reader itself (`diffzoo.zoo.manifest`).
"""

import math
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from diffzoo.encoders.text import MINILM
from diffzoo.errors import UserError, did_you_mean
from diffzoo.zoo import converters
from diffzoo.zoo.manifest import SOURCE_KINDS, Manifest, Pretrained, manifest_path, parse_manifest
from diffzoo.zoo.metadata import CLASS_LISTS

__all__ = ["check"]

CONVERTERS = ("diffzoo", *(found.name for found in pkgutil.iter_modules(converters.__path__)))


def check(text: str, file: str = "checkpoints.yaml") -> list[str]:
    """Everything that is wrong in a manifest's text, a sentence each: `file: entry.path.to.field: problem`."""
    manifest = parse_manifest(text, file)
    node = yaml.compose(text, yaml.SafeLoader)
    problems = [f"{file}: {problem}" for problem in _stands_twice(node, ())]
    for name in manifest:
        try:
            item = manifest[name]
        except UserError as error:
            problems.append(str(error))
            continue
        found = [
            *_names(item),
            *_numbers(manifest.data(name)),
            *_pins(item),
            *_process(item),
            *_partners(item, manifest),
        ]
        problems += [f"{file}: {name}.{problem}" for problem in found]
    return problems


def _stands_twice(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Keys that stand twice in one mapping, of which YAML takes the last in silence."""
    seen: set[str] = set()
    for i, item in enumerate(node.value if isinstance(getattr(node, "value", None), list) else ()):
        key, value = item if isinstance(item, tuple) else (None, item)
        name = str(i) if key is None else str(key.value)
        if name in seen:
            yield f"{'.'.join([*path, name])}: it stands twice, for the second time in line {key.start_mark.line + 1}"
        seen.add(name)
        yield from _stands_twice(value, (*path, name))


def _names(item: Pretrained) -> Iterator[str]:
    name, metadata = item.name, item.metadata
    if not re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
        yield "name: expected 'model.tag' in lower case, digits and underscores"
    if name.split(".")[0] != item.model:
        yield f"model: expected the part of the name before the dot, got {item.model!r}"
    if not metadata.licence:
        yield "weights_licence: missing"
    for i, source in enumerate((item.source, *item.mirrors)):
        where, converter = (f"mirrors.{i - 1}", source.converter) if i else ("source", item.converter)
        if converter is not None and converter not in CONVERTERS:
            yield f"converter: no converter is called {converter!r}{did_you_mean(converter, CONVERTERS)}"
        kinds = [kind for kind in SOURCE_KINDS if getattr(source, kind)]
        if len(kinds) != 1:
            yield f"{where}: expected exactly one of {', '.join(SOURCE_KINDS)}, got {kinds or 'none'}"
        if source.repo is not None and not (re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo) and source.file):
            yield f"{where}.repo: expected 'owner/name' and a file, got {source.repo!r}"
    if isinstance(metadata.class_names, str) and metadata.class_names not in CLASS_LISTS:
        yield f"class_names: expected a list of names, or one of {list(CLASS_LISTS)}, got {metadata.class_names!r}"


def _numbers(data: Any, path: str = "") -> Iterator[str]:
    """Numbers that are not finite, and sizes that are not positive."""
    if isinstance(data, float) and not math.isfinite(data):
        yield f"{path}: expected a finite number, got {data!r}"
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        where = f"{path}.{key}" if path else str(key)
        if key in ("size", "scaling_factor", "tolerance", "max_tokens") and value is not None and not value > 0:
            yield f"{where}: expected a positive number, got {value!r}"
        yield from _numbers(value, where)


def _pins(item: Pretrained) -> Iterator[str]:
    """Hashes and revisions: well formed, and explained where they are null."""
    vae, text = item.metadata.autoencoder, item.metadata.text_encoder
    pins = {"sha256": (item.sha256, 64)}
    for i, mirror in enumerate(item.mirrors):
        pins |= {f"mirrors.{i}.sha256": (mirror.sha256, 64), f"mirrors.{i}.revision": (mirror.revision, 40)}
    if item.source.repo:
        pins["source.revision"] = (item.source.revision, 40)
    if vae is not None:
        pins["autoencoder.revision"] = (vae.revision, 40)
    if text is not None and text.source != MINILM:  # that package is pinned by hash in the encoder
        pins["text_encoder.revision"] = (text.revision, 40)
    for name, (value, digits) in pins.items():
        if value is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            yield f"{name}: expected {digits} lower-case hexadecimal digits or null, got {value!r}"
    unknown = [name for name, (value, _) in pins.items() if value is None and not name.startswith("mirrors")]
    if unknown and not item.unpinned:
        yield f"unpinned: missing: it must say why {' and '.join(unknown)} is null"
    if (item.fingerprint is None) == (item.fingerprint_pending is None):
        yield "fingerprint: expected the recorded output, or fingerprint_pending saying why there is none"
    if item.fingerprint is not None and not item.fingerprint.first:
        yield "fingerprint.first: expected the first values of the output, got none"


def _process(item: Pretrained) -> Iterator[str]:
    process = item.metadata.process
    if process is None:
        yield "process: missing: it says what the network was trained to predict"
        return
    start, end = process.logsnr(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    if not end < start:  # also where one of them is not a number
        yield f"process.schedule: the log SNR must fall from data to noise, got {start:.3g} to {end:.3g}"


def _partners(item: Pretrained, manifest: Manifest) -> Iterator[str]:
    """Classifiers and bases of presets are entries themselves, and have the presets that are asked of them."""
    models = {name.split(".")[0]: name for name in reversed(list(manifest))} | {name: name for name in manifest}
    for name, preset in item.metadata.presets.items():
        for field in ("classifier", "base"):
            partner = getattr(preset, field)
            if partner is not None and partner not in models:
                yield f"presets.{name}.{field}: no entry is called {partner!r}{did_you_mean(partner, models)}"
        if preset.base in models and preset.base_preset is not None:
            known = manifest[models[preset.base]].metadata.presets
            if preset.base_preset not in known:
                yield f"presets.{name}.base_preset: {preset.base} has no preset {preset.base_preset!r}"
    for i, row in enumerate(item.published):
        if row.preset not in (None, *item.metadata.presets):
            yield f"published.{i}.preset: no preset {row.preset!r}; there are {list(item.metadata.presets)}"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else manifest_path()
    found = check(path.read_text(encoding="utf-8"), path.name)
    print("\n".join(found) or f"{path}: nothing is wrong")
    sys.exit(bool(found))
