"""The entry of `checkpoints.yaml` for a file that `diffzoo export` wrote.

python tools/manifest_entry.py diffzoo/weights/simple_uvit_xs_32.emoji.safetensors --tag emoji >> checkpoints.yaml
"""

import argparse
from pathlib import Path

import yaml

from diffzoo.files import sha256
from diffzoo.models import entry
from diffzoo.record import to_plain
from diffzoo.zoo import load_any
from diffzoo.zoo.manifest import IN_METADATA
from diffzoo.zoo.verify import fingerprint

__all__ = ["manifest_entry"]


def manifest_entry(file: Path, tag: str) -> str:
    """The entry as YAML; the fingerprint is that of the file's weights, which are what users get."""
    loaded = load_any(file)
    metadata, plain = loaded.metadata, loaded.metadata.to_plain()
    registered = to_plain(entry(str(metadata.name)).config)
    fields = {
        "model": metadata.name,
        "source": {"package": f"weights/{file.name}"},
        "sha256": sha256(file),
        "size": file.stat().st_size,
        "code_licence": "Apache-2.0",
        "weights_licence": metadata.licence,
        "converter": "diffzoo",
        "config": {k: v for k, v in to_plain(metadata.config).items() if v != registered.get(k, object())},
        **{key: plain.get(key) for key in IN_METADATA},
        "fingerprint": to_plain(fingerprint(loaded.network, loaded.process)),
        "training": to_plain(metadata.derived(file=None, weights=None).provenance, sparse=True),
    }
    known = {k: v for k, v in fields.items() if v not in (None, {}, [])}
    return str(yaml.safe_dump({f"{metadata.name}.{tag}": known}, sort_keys=False, allow_unicode=True, width=120))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tag", required=True, help="what follows the dot in the name of the entry")
    args = parser.parse_args()
    print(manifest_entry(args.file, args.tag), end="")
