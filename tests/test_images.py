"""Pictures: rounding, layout, atomic writing."""

import pytest
import torch
from PIL import Image

from diffzoo.errors import UserError
from diffzoo.images import make_grid, save_grid, save_png, to_float, to_uint8


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


def test_png_holds_pixels_and_text(tmp_path) -> None:
    images = torch.rand(4, 3, 5, 5) * 2 - 1
    grid = save_grid(images, tmp_path / "new" / "grid.png", 2, {"seeds": "0-3"})
    with Image.open(tmp_path / "new" / "grid.png") as opened:
        assert opened.info["seeds"] == "0-3"
        assert opened.size == (grid.shape[2], grid.shape[1])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_unwritable_folder_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write the picture"):
        save_png(torch.zeros(3, 2, 2, dtype=torch.uint8), tmp_path / "file" / "x.png")
