"""How fast pictures are served: against bare Pillow on one core, and against torch's DataLoader over the same folder.

    python benchmarks/data.py [FOLDER] [--size 256] [--workers N] [--seconds 5]

Without a folder it writes JPEGs of ImageNet's usual sizes into a temporary one. Every contestant decodes each picture,
cuts ADM's centre crop (BOX halving, then BICUBIC) and gives uint8 batches. They run in turn, `--repeats` times over;
printed are medians and ratios of this run:

    per core       pictures per second of CPU time in one process: ours / bare Pillow decode + resize
    torch          the same: ours / torch DataLoader over an image folder, shuffled
    workers        pictures per second with `--workers` processes: ours / torch DataLoader; wants an idle machine
    Parquet        ours from one Parquet file / ours from the folder, CPU time
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffzoo.data import HFDataset, ImageFolder

BATCH = 32


def make_folder(folder: Path, count: int) -> Path:
    """JPEGs of about 110 kB and the shapes of ImageNet's pictures, in ten classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        height, width = [(375, 500), (500, 375), (333, 500), (480, 640), (500, 500)][i % 5]
        coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        noise = generator.normal(0, 12, (height, width, 3))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def adm_crop(data: bytes, size: int) -> np.ndarray[Any, Any]:
    """Bare Pillow: decode, ADM's centre crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


class Plain(Dataset):
    """What a research repository has: an image folder with the crop above."""

    def __init__(self, files: list[Path], size: int):
        self.files, self.size = files, size
        self.classes = {c: i for i, c in enumerate(sorted({f.parent.name for f in files}))}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.files[index]
        pixels = adm_crop(path.read_bytes(), self.size)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.classes[path.parent.name]


def rate(batches: Iterator[Any], seconds: float, count: Any, clock: Any) -> float:
    """Pictures per second of a clock, after one batch to start."""
    next(batches)
    pictures, start, begun = 0, clock(), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        pictures += count(next(batches))
    return float(pictures / (clock() - start))


def clock_of(workers: int) -> Any:
    """CPU time where one process does all, which other programs disturb little; else the wall's."""
    return time.perf_counter if workers else time.process_time


def bare(files: list[Path], size: int, seconds: float) -> float:
    """One process, nothing but Pillow."""

    def batches() -> Iterator[list[Any]]:
        while True:
            for first in range(0, len(files) - BATCH + 1, BATCH):
                yield [adm_crop(f.read_bytes(), size) for f in files[first : first + BATCH]]

    return rate(batches(), seconds, len, clock_of(0))


def torch_loader(files: list[Path], size: int, workers: int, seconds: float) -> float:
    """torch's DataLoader, shuffled, with persistent workers."""
    loader = DataLoader(Plain(files, size), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
                        drop_last=True)  # fmt: skip

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    return rate(batches(), seconds, lambda batch: len(batch[0]), clock_of(workers))


def ours(data: Any, seconds: float) -> float:
    """A data module of diffzoo, as training sees it."""

    loader = data.train_dataloader()  # asked for once, as a Trainer does: its workers live on

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    try:
        return rate(batches(), seconds, lambda batch: len(batch["id"]), clock_of(data.num_workers))
    finally:
        data.teardown()


def write_parquet(files: list[Path], path: Path) -> Path:
    """The same pictures in one file, row groups of 100."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": f.read_bytes(), "path": f.name} for f in files], struct)
    labels = pa.array([int(f.parent.name.removeprefix("class") or 0) if f.parent.name[-1:].isdigit() else 0
                       for f in files], pa.int64())  # fmt: skip
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=100)
    return path


def main() -> None:
    """Measure in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of pictures; default: JPEGs made on the spot")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default: 256)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes of both")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--pictures", type=int, default=1000, help="how many to make (default: 1000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or make_folder(Path(temporary) / "pictures", args.pictures)
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        parquet = write_parquet(files, Path(temporary) / "pictures.parquet")
        common = {"image_size": args.size, "batch_size": BATCH, "cache": False}

        def module(workers: int, **more: Any) -> ImageFolder:
            return ImageFolder(str(folder), num_workers=workers, **common, **more)

        several = args.workers
        contestants = {
            "bare Pillow": lambda: bare(files, args.size, args.seconds),
            "ours": lambda: ours(module(0), args.seconds),
            "torch DataLoader": lambda: torch_loader(files, args.size, 0, args.seconds),
            "ours, Parquet": lambda: ours(HFDataset(str(parquet), num_workers=0, **common), args.seconds),
            f"torch DataLoader, {several} workers": lambda: torch_loader(files, args.size, several, args.seconds),
            f"ours, {several} workers": lambda: ours(module(several), args.seconds),
        }
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.repeats):
            for name, measure in contestants.items():
                found[name].append(measure())
        medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{len(files)} pictures to {args.size} px, medians of {args.repeats} turns of {args.seconds:g} s")
    for name, value in medians.items():
        print(f"  {name:<36} {value:7.1f} pictures/s   ({', '.join(f'{v:.1f}' for v in found[name])})")
    plain, mine, loader, table, loader_workers, mine_workers = medians.values()
    print(f"per core  {mine / plain:.2f}   (at least 0.90)")
    print(f"torch     {mine / loader:.2f}   (at least 1.00)")
    print(f"workers   {mine_workers / loader_workers:.2f}   (at least 1.00)")
    print(f"Parquet   {table / mine:.2f}")


if __name__ == "__main__":
    main()
