"""What a source holds: counts, sizes, classes, licence, speed, a contact sheet."""

import contextlib
import functools
import io
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from diffzoo.data.bad_images import BadImage
from diffzoo.data.base import ImageDataModule
from diffzoo.data.batches import Transform
from diffzoo.data.decode import Bands, load
from diffzoo.data.latents import CACHE_METADATA, Latents, LatentSource, read_cache_metadata
from diffzoo.data.sources import Record, Source
from diffzoo.errors import UserError
from diffzoo.images import make_grid, save_image
from diffzoo.sizes import as_size, size_text

__all__ = ["Report", "contact_sheet", "latent_report", "quiet", "report"]

Report = dict[str, object]  # texts, numbers and dictionaries of these, by what they say

SAMPLED_BLOCKS = 8
SHEET_SIZE, SHEET_COLUMNS = 64, 12  # pixels, images
MEASURED_SECONDS = 3.0


def report(data: ImageDataModule, sample: int) -> Report:
    """What the rows of a data module are, with sizes and kinds of `sample` images."""
    source = data.train_source
    report: Report = {
        "source": source.name,
        "read as": getattr(data, "decision", "the demo set"),
        "rows": {"train": len(source), "held out": len(data.val_source) if data.val_source else 0},
        "columns": ", ".join(source.columns()),
        "licence": source.licence or "not stated",
        "revision": source.revision or "none",
        "read": f"{len(source.block_sizes)} blocks, {'any row alone' if source.random_access else 'block by block'}",
        "captions": "yes" if source.has_captions else "no",
        "hash of the rows": source.rows_hash,
    }
    report |= _classes(source)
    report |= _measure(source, sample)
    traces = [*_lossy_trace(report.pop("every image", "")), *_label_trace(source, data.val_source)]
    if traces:
        report["traces"] = "; ".join(traces)
    lacking = "rows without a class" in report
    report["throughput"] = "not measured: training needs a class for every row" if lacking else _throughput(data)
    return report


def _classes(source: Source) -> Report:
    """How many rows each class has, where there are classes."""
    labels = source.label_values(range(len(source)))
    if labels is None:
        return {}
    counts = Counter(labels)
    histogram = {name: counts[i] for i, name in enumerate(source.class_names)}
    lacking = {"rows without a class": counts[None]} if counts[None] else {}
    return {"classes": len(histogram), "class histogram": histogram, **lacking}


def latent_report(folder: Path, workers: int | None) -> Report:
    """What the metadata of a cache of latents say, and what of it is there."""
    report: Report = {"source": f"latents in {folder}"}
    whole: dict[str, LatentSource] = {}
    for part in sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob(CACHE_METADATA)):
        made = read_cache_metadata(folder / part)
        there = len(made.present(folder / part))
        counted = "none counted yet" if made.images is None else made.images
        said: Report = {
            "images": f"{counted} of the {made.rows} of {made.source}",
            "shards": f"{there} of {made.shards}" + ("" if there == made.shards else ", incomplete"),
            "image size": f"{size_text(made.image_size)} px, resize {made.resize}",
            "mirror images": "yes" if made.flips > 1 else "no",
            "autoencoder": f"{made.autoencoder} ({made.autoencoder_hash[:12]})",
            "classes": len(made.class_names),
            "captions": "yes" if made.has_captions else "no",
            "revision": made.revision or "none",
            "licence": made.licence or "not stated",
            "hash of the rows": made.rows_hash,
            "hash of their ids": made.ids or "none yet",
        }
        if made.images is not None:
            whole[part] = LatentSource(folder / part)
            said["latent size"] = " x ".join(map(str, whole[part].shape[1:])) + " px"
        report[part] = said
    train = [whole.get(part) for part in report if part.startswith("train")]
    sources = [source for source in train if source is not None]
    if sources and len(sources) == len(train):
        sizes = [as_size(list(source.shape[1:])) for source in sources]
        buckets, mirrored = None if "train" in whole else sizes, sources[0].cache_metadata.flips > 1
        data = Latents(str(folder), sizes[0], buckets=buckets, flip=mirrored, num_workers=workers)
        report |= {k: v for k, v in _classes(data.train_source).items() if k == "class histogram"}
        report["throughput"] = _throughput(data)
    return report


def _some(source: Source, count: int) -> Iterator[Record]:
    """Evenly spread rows, by class where that is known; of a source that is read by block, from a few blocks."""
    if source.random_access:
        labels = source.label_values(range(len(source))) or [None] * len(source)
        ranked = np.argsort([-1 if label is None else label for label in labels], kind="stable")
        count = min(count, len(source))
        yield from (source.read_row(int(ranked[len(source) * i // count])) for i in range(count))
        return
    blocks = min(SAMPLED_BLOCKS, len(source.block_sizes))
    for k in range(blocks):
        records = source.read_block(len(source.block_sizes) * k // blocks)
        take = min(len(records), -(-count // blocks))
        yield from (records[len(records) * i // take] for i in range(take))


def _lossy_trace(kind: object) -> list[str]:
    """What `map` of `datasets` leaves behind, where every image is of one kind."""
    if kind != "JPEG RGB quality 75":
        return []
    return [
        "every image is a JPEG of quality 75. `map` of `datasets` writes images so, also lossless ones, when its "
        "function looks at them: cast the column to Image(decode=False) first if the originals were better"
    ]


def _label_trace(train: Source, held_out: Source | None) -> list[str]:
    """Labels that one split has and the other lacks, as `imagefolder` of `datasets` and test sets leave them."""
    if held_out is None:
        return []
    try:
        lacking = {"training": _unlabelled(train), "held-out": _unlabelled(held_out)}
    except UserError as error:  # labels that are no classes, such as the -1 of test sets
        return [str(error)]
    if len(set(map(bool, lacking.values()))) == 1:  # both are labelled, or neither is
        return []
    split, count = max(lacking.items(), key=lambda item: item[1])
    other = next(name for name in lacking if name != split)
    return [
        f"{count} {split} rows have no label and all {other} rows have one. `imagefolder` of `datasets` drops labels "
        "where one split has metadata or an image lies above the classes, and test sets hide them. A class-conditional "
        "run needs both"
    ]


def _unlabelled(source: Source) -> int:
    """How many rows have no label."""
    labels = source.label_values(range(len(source)))
    return len(source) if labels is None else sum(label is None or label < 0 for label in labels)


def _measure(source: Source, sample: int) -> Report:
    """Sizes and aspect ratios of evenly spread images."""
    shapes, kinds, bad = [], [], []
    for record in _some(source, sample):
        try:
            image = load(record.image or b"")
            width, height = image.size
            shapes.append((width, height))
            kinds.append(_kind(image))
        except Exception as error:  # Pillow raises nearly any type on broken data
            bad.append(f"{record.name}: {type(error).__name__}: {error}")
    count = len(shapes) + len(bad)
    if not shapes:
        return {"bad images": f"{len(bad)} of {count}"}
    width, height = np.array(shapes).T
    quantiles = {"smallest": 0, "5 %": 5, "median": 50, "95 %": 95, "largest": 100}

    def spread(values: NDArray[np.float64], digits: int) -> str:
        return ", ".join(f"{name} {np.percentile(values, q):.{digits}f}" for name, q in quantiles.items())

    result: Report = {
        f"sizes of {count} images": {
            "width": spread(width, 0),
            "height": spread(height, 0),
            "short side": spread(np.minimum(width, height), 0),
            "width / height": spread(width / height, 2),
        },
        "kinds": ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).most_common()),
        "bad images": f"{len(bad)} of {count}",
    }
    if len(shapes) > 1 and len(set(kinds)) == 1:
        result["every image"] = kinds[0]
    if bad:
        result["first bad image"] = bad[0]
    return result


@functools.cache
def _quality_75() -> tuple[list[int], ...]:
    """The quantization tables of Pillow's JPEG files of its usual quality."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return tuple(cast(JpegImageFile, Image.open(out)).quantization.values())


def _kind(image: Image.Image | Bands) -> str:
    """Format and mode of an image, such as "PNG RGB", or the shape of its values."""
    if isinstance(image, Bands):
        return f"{image.values.shape[2]} channels of {image.values.dtype}"
    quality = " quality 75" if tuple(getattr(image, "quantization", {}).values()) == _quality_75() else ""
    return f"{image.format} {image.mode}{quality}"


def _throughput(data: ImageDataModule) -> str:
    """Images per second that training would get, without cached ones. Small sets are passed over and over."""
    passes = data.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(passes))
    with quiet():
        next(batches)  # the workers start
        images, start = 0, time.perf_counter()
        while not images or time.perf_counter() - start < MEASURED_SECONDS:
            images += len(next(batches)["id"])
        rate = images / (time.perf_counter() - start)
    data.teardown()
    number = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{number} images/s at {size_text(data.image_size)} px with {data.num_workers} workers"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning for each bad image, since reports count them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(skipped|left out) a bad image")
        yield


def contact_sheet(data: ImageDataModule, path: Path) -> Path:
    """Evenly spread images of the training rows with their class or caption, by class where there are classes."""
    source, transform = data.train_source, Transform(SHEET_SIZE, flip=False)
    images, labels = [], []
    for record in _some(source, SHEET_COLUMNS**2):
        with contextlib.suppress(BadImage):
            images.append(transform.pixels(record, ()))
            caption = next(iter(record.captions), "")
            labels.append(caption if record.label is None else source.class_names[record.label])
    if not images:
        raise UserError(f"none of the images of {source.name} that were tried can be decoded")
    return save_image(make_grid(torch.from_numpy(np.stack(images)), SHEET_COLUMNS, labels=labels), path)
