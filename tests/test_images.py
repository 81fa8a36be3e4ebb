"""Images: rounding, layout, atomic writing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.images import make_grid, save_image, to_float, to_uint8


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert (images.min(), images.max(), images.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(images), pixels)


def test_pixels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(values, "truncate").tolist() == [0, 0, 0, 0, 255, 255]


def test_grid_places_pictures_row_by_row() -> None:
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 4, 3)
    grid = make_grid(pixels, columns=3, margin=1)
    assert grid.shape == (3, 2 * 5 + 1, 3 * 4 + 1)
    corners = grid[0, 1::5, 1::4]
    assert corners.tolist() == [[0, 1, 2], [3, 4, 255]]


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
