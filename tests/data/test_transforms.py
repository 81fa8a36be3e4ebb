"""Pixels: ADM's crop restated, images of every mode, determinism of the random choices."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffzoo.data.transforms import augment, decode, resize_crop


def photo(width: int, height: int) -> Image.Image:
    """A smooth image with some texture."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    base = np.stack([128 + 100 * np.sin(x / 17), 128 + 100 * np.cos(y / 23), 128 + 90 * np.sin((x + y) / 31)], -1)
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def adm_crop(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """What ADM's training does to an image, step by step (arXiv:2105.05233, released code's description).

    ADM knows squares; for others the image covers rows and columns as it covers the square there.
    """
    w, h = image.size
    while h >= 2 * rows and w >= 2 * columns:
        w, h = w // 2, h // 2
        image = image.resize((w, h), resample=Image.BOX)
    scale = columns / w if columns * h > rows * w else rows / h
    image = image.resize((round(w * scale), round(h * scale)), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - rows) // 2, (array.shape[1] - columns) // 2
    return array[y : y + rows, x : x + columns]


@pytest.mark.parametrize("shape", [(400, 300), (300, 401), (64, 64), (65, 200), (40, 50), (1025, 513)])
@pytest.mark.parametrize("size", [32, 64])
def test_adm_crop_is_bit_equal(shape: tuple[int, int], size: int) -> None:
    image = photo(*shape)
    assert np.array_equal(resize_crop(image, size), adm_crop(image, size, size))
    assert np.array_equal(resize_crop(image, (size, 2 * size)), adm_crop(image, size, 2 * size))
    assert np.array_equal(resize_crop(image, (size + 8, size)), adm_crop(image, size + 8, size))


@pytest.mark.parametrize("resize", ["adm", "area", "lanczos"])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_sizes_and_brightness(resize: str, crop: str) -> None:
    image = photo(300, 200)
    pixels = resize_crop(image, 48, resize, crop, (0.3, 0.99, 0.0))
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    assert abs(pixels.mean() - np.asarray(image).mean()) < 12


@pytest.mark.parametrize("shape", [(400, 300), (300, 401), (65, 200), (40, 50)])
@pytest.mark.parametrize(("resize", "method"), [("area", Image.BOX), ("lanczos", Image.LANCZOS)])
@pytest.mark.parametrize("draws", [(0.0, 0.0, 0.0), (0.3, 0.99, 0.0), (0.9, 0.4, 0.999)])
def test_random_crop_is_cut_from_the_whole_resized_image(shape, resize: str, method, draws) -> None:
    image, size = photo(*shape), 32
    short = size + int(draws[0] * (40 + 1 - size))  # 40 = 32 / 0.8
    factor = short / min(shape)
    whole = np.asarray(image.resize((round(shape[0] * factor), round(shape[1] * factor)), resample=method))
    top, left = (int(d * (n - size + 1)) for d, n in zip(draws[1:], whole.shape, strict=False))
    cut = whole[top : top + size, left : left + size]
    assert np.array_equal(resize_crop(image, size, resize, "random", draws), cut)
    wide = resize_crop(image, (size, 2 * size), resize, "random", draws)
    assert wide.shape == (size, 2 * size, 3)


def test_area_of_a_whole_factor_is_the_mean_of_blocks() -> None:
    image = photo(256, 256)
    blocks = np.asarray(image, dtype=float).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(resize_crop(image, 64, "area") - blocks).max() <= 1.01  # Pillow rounds after each axis


def test_random_crop_covers_the_image_and_its_scales() -> None:
    """An image whose colour is its column: crops reach both edges, and widths span [0.8, 1] of the short side."""
    ramp = np.tile(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], (100, 1, 3))
    image = Image.fromarray(ramp)
    spans = []
    for visit in range(400):
        draws, _ = augment(0, 5, visit, "random", False)
        row = resize_crop(image, 50, "area", "random", draws)[0, :, 0].astype(int)
        spans.append((row[0], row[-1]))
    low, high = np.array(spans).T
    assert low.min() <= 3
    assert high.max() >= 252
    widths = (high - low) / 255
    assert 0.76 < widths.min() < 0.85
    assert widths.max() > 0.96


def test_choices_depend_on_seed_row_and_visit_alone() -> None:
    first = [augment(0, 7, v, "random", True) for v in range(200)]
    torch.manual_seed(99)
    np.random.seed(1)
    assert first == [augment(0, 7, v, "random", True) for v in range(200)]
    assert len({f[0] for f in first}) == 200
    assert augment(1, 7, 0, "random", True) != first[0]
    assert augment(0, 8, 0, "random", True) != first[0]
    assert abs(sum(f[1] for f in first) / 200 - 0.5) < 4 * math.sqrt(0.25 / 200)
    assert augment(0, 7, 0, "center", False) == ((), False)


RED = (200, 30, 60)


def plain(mode: str) -> Image.Image:
    return Image.new("RGB", (9, 7), RED).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_formats(kind: str) -> None:
    pixels = np.asarray(decode(encoded(Image.new("RGB", (9, 7), RED), kind)))
    assert np.abs(pixels.astype(int) - RED).max() <= 6


def test_grey_is_repeated() -> None:
    grey = Image.new("L", (4, 4), 77)
    assert (np.asarray(decode(encoded(grey, "PNG"))) == 77).all()


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(np.asarray(decode(encoded(half, "PNG"))).astype(int) - 127).max() <= 1
    clear = Image.new("LA", (4, 4), (0, 0))
    assert (np.asarray(decode(encoded(clear, "PNG"))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.info["transparency"] = 0
    assert (np.asarray(decode(encoded(palette, "PNG", transparency=0))) == 255).all()


def test_cmyk() -> None:
    pixels = np.asarray(decode(encoded(plain("CMYK"), "JPEG", quality=95)))
    assert np.abs(pixels.astype(int) - RED).max() <= 8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG")))
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 0.51
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_exif_rotation() -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 10))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the left becomes the top
    turned = np.asarray(decode(encoded(image, "JPEG", exif=exif.tobytes(), quality=95)))
    assert turned.shape[:2] == (20, 10)
    assert turned[:8].min() > 240
    assert turned[12:].max() < 15


def test_draft_is_close_and_leaves_enough() -> None:
    data = encoded(photo(1600, 1200), "JPEG", quality=92)
    full, draft = decode(data), decode(data, draft=128)
    assert min(draft.size) >= 128
    assert draft.width < full.width
    difference = resize_crop(full, 64).astype(int) - resize_crop(draft, 64)
    assert np.abs(difference).mean() < 2
    assert decode(data, draft=700).size == full.size


def test_truncated_is_an_error() -> None:
    data = encoded(photo(200, 200), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        decode(data[: len(data) // 2])
