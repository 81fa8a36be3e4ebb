"""Images: rounding, layout, atomic writing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.generation.samples import Samples
from diffzoo.images import LINE, make_grid, save_image, to_float, to_uint8


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert (images.min(), images.max(), images.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(images), pixels)


def test_pixels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(values, "truncate").tolist() == [0, 0, 0, 0, 255, 255]


def test_grid_places_images_row_by_row() -> None:
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 128, 130)
    grid = make_grid(pixels, columns=3, margin=1)
    assert grid.shape == (3, 2 * 129 + 1, 3 * 131 + 1)
    corners = grid[0, 1::129, 1::131]
    assert corners.tolist() == [[0, 1, 2], [3, 4, 255]]


@pytest.mark.parametrize(("size", "shown"), [(8, 32), (32, 128), (48, 96), (64, 128), (100, 100), (256, 256)])
def test_small_images_are_enlarged_pixel_by_pixel(size: int, shown: int) -> None:
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    grid = make_grid(pixels, columns=2, margin=0)
    assert grid.shape == (3, shown, 2 * shown)
    assert torch.equal(grid[:, :: shown // size, : shown : shown // size], pixels[0])


def test_labels_stand_below_their_images_and_heads_above_their_columns() -> None:
    grey = torch.full((3, 3, 64, 64), 128, dtype=torch.uint8)
    plain = make_grid(grey, columns=2)
    grid = make_grid(grey, columns=2, labels=["", "a class with a name that is much too long", "x"], heads=["", "head"])
    assert grid.shape[1:] == (plain.shape[1] + (1 + 2 * 2) * LINE, plain.shape[2])
    ink = (grid < 128).all(0)
    image = 128 + 2
    assert not ink[:, : image + 2][: image + LINE].any()  # the first column has no head, its first image no label
    assert ink[:LINE, image + 2 :].any()
    rows = ink[LINE + image : LINE + image + 2 * LINE]
    assert rows[:LINE].any()
    assert rows[LINE:].any()  # a second line
    assert rows[:, image + 2 :].any()
    assert not rows[:, : image + 2].any()
    assert ink[-2 * LINE - 2 :, :image].any()
    assert int((grid == 128).all(0).sum()) >= 3 * 128 * 128  # no text covers an image


@pytest.mark.parametrize(("suffix", "format_"), [(".png", "PNG"), (".webp", "WEBP"), (".jpg", "JPEG")])
def test_a_file_is_what_its_name_says_and_holds_pixels_and_text(tmp_path: Path, suffix: str, format_: str) -> None:
    pixels = torch.full((3, 16, 8), 90, dtype=torch.uint8)
    pixels[:, 8:] = 200
    path = save_image(pixels, tmp_path / "new" / f"x{suffix}", {"diffzoo": '{"seed": 3}'})
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"x{suffix}"]
    with Image.open(path) as opened:
        assert opened.format == format_
        read = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
        said = opened.info.get("diffzoo") or opened.getexif()[0x010E]
    assert (read.int() - pixels.int()).abs().max() <= (3 if suffix == ".jpg" else 0)
    assert said == '{"seed": 3}'


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA"), (7, None)])
def test_images_keep_their_channels(tmp_path: Path, channels: int, mode: str | None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, channels)).astype(np.uint8)
    samples = Samples(pixels, ["a", "b"], [{"seed": 0}, {"seed": 1}], 2)
    for path, image, seed in zip(samples.save_png(tmp_path), pixels, (0, 1), strict=True):
        if mode is None:
            assert np.array_equal(np.load(path), image)
            assert json.loads(path.with_suffix(".diffzoo.json").read_text()) == {"seed": seed}
        else:
            with Image.open(path) as saved:
                assert saved.mode == mode
                assert np.array_equal(np.asarray(saved).reshape(image.shape), image)
    assert samples.save_grid(tmp_path / "grid.png").is_file()


def test_values_that_are_not_finite_are_no_pixels() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1:, 0, 1, 1] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(UserError, match=r"2 of 3 images hold values that are not finite .* the first is image 41"):
        to_uint8(images, first=40)


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"images are written as .png, .*, got the file name 'x.gif'"):
        save_image(torch.zeros(3, 2, 2, dtype=torch.uint8), "x.gif")
    with pytest.raises(UserError, match="could not write the image"):
        save_image(torch.zeros(3, 2, 2, dtype=torch.uint8), tmp_path / "file" / "x.png")
