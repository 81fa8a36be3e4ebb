"""Images of many channels and deep values, from files written here by their specifications."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from diffzoo.data import ImageFolder
from diffzoo.data.decode import Bands, decode, decode_bands, load
from diffzoo.data.tiff import read_bands, tiff_tags

Array = np.ndarray[Any, Any]
_SINGLE = ("u2", "i2", "u4", "i4", "f2", "f4", "f8")


def tiff(
    bands: Array, order: str = "<", tile: int = 16, deflated: bool = False, predictor: int = 1, colour: int = 1,
    orientation: int = 1,
) -> bytes:  # fmt: skip
    """A TIFF of tiles."""
    height, width, count = bands.shape
    bands = bands.astype(bands.dtype.newbyteorder(order))
    padded = np.pad(bands, ((0, -height % tile), (0, -width % tile), (0, 0)))
    body, places = b"", []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            part = padded[top : top + tile, left : left + tile]
            if predictor == 3:  # Adobe's technical note 3: bytes in planes, the highest first, then their differences
                high_first = part.astype(part.dtype.newbyteorder(">")).reshape(tile, -1, 1).view(np.uint8)
                part = high_first.swapaxes(1, 2).reshape(tile, -1, count)
            if predictor > 1:
                part = np.concatenate([part[:, :1], np.diff(part, axis=1)], axis=1).astype(part.dtype)
            raw = zlib.compress(part.tobytes()) if deflated else part.tobytes()
            places.append((8 + len(body), len(raw)))
            body += raw + bytes(len(raw) % 2)
    tags = {256: [width], 257: [height], 258: [8 * bands.itemsize] * count, 259: [8 if deflated else 1], 262: [colour]}
    tags |= {274: [orientation], 277: [count], 284: [1], 317: [predictor], 322: [tile], 323: [tile]}
    tags |= {
        324: [at for at, _ in places],
        325: [n for _, n in places],
        339: [{"u": 1, "i": 2, "f": 3}[bands.dtype.kind]],
    }
    entries = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        at = struct.pack(f"{order}I", 8 + len(body))
        body += b"" if len(values) == 1 else packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + (packed if len(values) == 1 else at)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def png(values: Array) -> bytes:
    """A PNG of 16 bits."""
    height, width, count = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("deflated", "predicted"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("dtype", "count"),
    [("u2", 16), ("u1", 6), ("u2", 3), ("u2", 2), ("f4", 4), ("f2", 3), ("f8", 5), *((t, 1) for t in _SINGLE)],
)
def test_tiles_of_a_tiff(order: str, deflated: bool, predicted: bool, dtype: str, count: int) -> None:
    bands = np.random.default_rng(0).integers(0, 250, (37, 50, count)).astype(dtype)
    if dtype[0] != "u":
        bands = bands - bands.dtype.type(120.25)
    predictor = (3 if bands.dtype.kind == "f" else 2) if predicted else 1
    found = load(tiff(bands, order, 16, deflated, predictor))
    assert isinstance(found, Bands)
    assert np.array_equal(found.values, bands)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiffs_are_turned_as_shallow_ones(orientation: int) -> None:
    bands = np.random.default_rng(4).integers(0, 250, (37, 50, 1)).astype("u1")
    deep = load(tiff(bands.astype("u2"), orientation=orientation))
    assert isinstance(deep, Bands)
    assert np.array_equal(deep.values[..., 0], np.asarray(load(tiff(bands, orientation=orientation))))


def test_the_predictor_of_floats_as_libtiff_writes_it() -> None:
    values = np.random.default_rng(5).normal(size=(40, 30)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF", compression="tiff_lzw", tiffinfo={317: 3, 278: 7})
    assert tiff_tags(out.getvalue())[317] == (3,)
    assert np.array_equal(read_bands(out.getvalue(), tiff_tags(out.getvalue()))[..., 0], values)


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero(bits: int) -> None:
    """Pillow turns such images of eight bits round, and leaves those of 16."""
    values = np.linspace(0, 2**bits - 1, 64).reshape(8, 8).astype(f"u{bits // 8}")
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 0), (273, 8), (277, 1), (278, 8), (279, values.nbytes)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    file = head + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)
    grey = np.asarray(decode_bands(file, 1)[0])
    assert np.abs(grey - (255 - values / (2**bits - 1) * 255)).max() <= 0.5


@pytest.mark.parametrize(("kind", "several"), [("TIFF", True), ("GIF", True), ("PNG", True), ("MPO", False)])
def test_pages_that_are_not_read_are_said(tmp_path: Path, kind: str, several: bool) -> None:
    pages = [Image.new("RGB", (8, 8), (80 * i, 0, 0)) for i in range(3)]
    suffix = "jpg" if kind == "MPO" else kind.lower()
    pages[0].save(tmp_path / f"0.{suffix}", kind, save_all=True, append_images=pages[1:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = ImageFolder(str(tmp_path), image_size=8).train_source
    assert any(f"only the first frame or page of {source.name}/0" in str(w.message) for w in caught) == several


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_strips_of_a_tiff(compression: str) -> None:
    """Pillow writes one channel; the same bytes are three of a third of the width."""
    bands = np.random.default_rng(1).integers(0, 4096, (40, 30, 3)).astype(np.uint16)
    out = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[278] = 7  # rows per strip
    Image.fromarray(bands.reshape(40, 90)).save(out, "TIFF", compression=compression, tiffinfo=tags)
    known = {**tiff_tags(out.getvalue()), 256: (30,), 258: (16,) * 3, 277: (3,), 262: (2,)}
    assert np.array_equal(read_bands(out.getvalue(), known), bands)
    out, tags[278] = io.BytesIO(), 8
    Image.fromarray(np.concatenate(list(bands.transpose(2, 0, 1)))).save(
        out, "TIFF", compression=compression, tiffinfo=tags
    )
    known |= tiff_tags(out.getvalue()) | {257: (40,), 258: (16,) * 3, 277: (3,), 284: (2,)}  # channel after channel
    assert np.array_equal(read_bands(out.getvalue(), known), bands)


def test_twelve_bits_in_sixteen_of_colour_do_not_turn_black() -> None:
    values = np.random.default_rng(2).integers(0, 4096, (9, 8, 4)).astype(np.uint16)
    values[..., 3] = 65535
    want = np.rint(values[..., :3] * (255 / 4095)).astype(np.uint8)
    for data in (png(values[..., :3]), png(values), tiff(values[..., :3], colour=2)):
        assert np.array_equal(np.asarray(decode(data)), want)
    assert np.asarray(decode_bands(png(values), 4)[3]).min() == 255
    grey = values[..., [0, 3]]
    assert np.array_equal(np.asarray(decode(png(grey)))[..., 0], want[..., 0])
    grey = values[..., :1]
    assert np.array_equal(np.asarray(decode_bands(png(grey), 1)[0]), want[..., 0])


def test_channels_beside_the_colours() -> None:
    bands = np.random.default_rng(3).integers(0, 256, (9, 8, 4)).astype(np.uint8)
    data = tiff(bands, colour=2)  # of red, green, blue and near infrared
    assert np.array_equal(np.stack([np.asarray(p) for p in decode_bands(data, 4)], 2), bands)
    assert np.array_equal(np.asarray(decode(data)), bands[..., :3])
    with pytest.raises(ValueError, match="6 channels, expected 3: set channels"):
        decode(tiff(np.zeros((8, 8, 6), np.uint8)))
