"""TIFF images that Pillow cuts to eight bits, misreads or does not read: with deep values, or many bands.

Pillow decodes every compression that libtiff knows, but only into its own modes, and it swaps the bytes of compressed
big-endian values twice. So the file is given to it as a grey image with a pixel for every byte: the bytes of a strip or
a tile are the same. Predictors depend on the values and their channels; they are undone here.
"""

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

__all__ = ["is_tiff", "read_bands", "tiff_tags"]

# the tags that matter, of TIFF 6.0
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
STRIPS, SAMPLES, ROWS, SIZES, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, EXTRA, FORMAT = 322, 323, 324, 325, 338, 339
ALPHA = (1, 2)  # values of EXTRA
Array = np.ndarray
Tags = Mapping[int, Sequence[int]]


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF, of 32 or 64 bits."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """The values of every tag of the first image in a file."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return {tag: v if isinstance(v, tuple) else (v,) for tag, v in directory.items()}


def read_bands(data: bytes, tags: Tags) -> Array:
    """The channels `(h, w, channels)` of a TIFF as they are, turned as its orientation says.

    Raises:
        OSError, SyntaxError, ValueError: the file is truncated, or coded in a way that is not read.
    """
    count, (height, width) = int(tags.get(SAMPLES, (1,))[0]), (int(tags[HEIGHT][0]), int(tags[WIDTH][0]))
    bits, kind = int(tags[BITS][0]), {1: "u", 2: "i", 3: "f"}.get(tags.get(FORMAT, (1,))[0], "")
    if f"{kind}{bits}" not in ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f16", "f32", "f64"):
        raise ValueError(f"a TIFF of {count} channels of {bits} bits: expected integers of whole bytes or floats")
    dtype = np.dtype(f"{'<' if data[:2] == b'II' else '>'}{kind}{bits // 8}")
    planes = count if tags.get(PLANAR, (1,))[0] == 2 else 1
    channels = count // planes
    wide = int(tags[TILE_WIDTH][0]) if TILES in tags else width
    offsets, sizes = (TILES, TILE_SIZES) if TILES in tags else (STRIPS, SIZES)
    each = len(tags[offsets]) // planes
    found = []
    for plane in range(planes):
        here = slice(plane * each, (plane + 1) * each)
        raw = _bytes(data, {**tags, offsets: tags[offsets][here], sizes: tags[sizes][here]}, channels * dtype.itemsize)
        tiles = raw.reshape(height, -1, wide * channels * dtype.itemsize)
        found.append(_values(tiles, dtype, channels, int(tags.get(PREDICTOR, (1,))[0])))
    return _turned(np.concatenate(found, axis=2)[:, :width], int(tags.get(ORIENTATION, (1,))[0]))


def _bytes(data: bytes, tags: Tags, wider: int) -> NDArray[np.uint8]:
    """The decompressed bytes of strips or of whole tiles, row by row: `wider` of them for each pixel."""
    width, height = int(tags[WIDTH][0]), int(tags[HEIGHT][0])
    kept = (COMPRESSION, STRIPS, SIZES, ROWS, TILE_HEIGHT, TILES, TILE_SIZES)
    new: dict[int, Sequence[int]] = {tag: tags[tag] for tag in kept if tag in tags}
    if TILE_WIDTH in tags:
        wide = int(tags[TILE_WIDTH][0])
        new[TILE_WIDTH], width = (wide * wider,), -(-width // wide) * wide
    new |= {WIDTH: (width * wider,), HEIGHT: (height,), BITS: (8,), PHOTOMETRIC: (1,), SAMPLES: (1,)}
    with Image.open(io.BytesIO(_with_tags(data, new)), formats=("TIFF",)) as image:
        return np.frombuffer(image.tobytes(), np.uint8)


def _values(tiles: Array, dtype: np.dtype, channels: int, predictor: int) -> Array:
    """Values `(h, w, channels)` of bytes `(h, tiles, bytes per row of a tile)`, with the predictor undone."""
    height, across, _ = tiles.shape
    if predictor == 3:  # differences of bytes, which lie plane by plane, the highest of each value first
        steps = tiles.reshape(height, across, -1, channels)
        whole = np.cumsum(steps, axis=2, dtype=np.uint8).reshape(height, across, dtype.itemsize, -1)
        tiles, dtype = np.ascontiguousarray(whole.swapaxes(2, 3)), dtype.newbyteorder(">")
    values = tiles.reshape(-1).view(dtype).astype(dtype.newbyteorder("=")).reshape(height, across, -1, channels)
    if predictor == 2:
        np.cumsum(values, axis=2, dtype=values.dtype, out=values)
    return values.reshape(height, -1, channels)


def _turned(values: Array, orientation: int) -> Array:
    """An image the right way up; see the tag Orientation of TIFF 6.0."""
    if 5 <= orientation <= 8:
        values = values.swapaxes(0, 1)
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _with_tags(data: bytes, tags: Tags) -> bytes:
    """A file with another directory in place of its own; what the directory points at stays where it is."""
    order = "<" if data[:2] == b"II" else ">"
    begin = len(data) + len(data) % 2
    after = begin + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag in sorted(tags):
        packed = struct.pack(f"{order}{len(tags[tag])}I", *map(int, tags[tag]))
        inline = packed if len(packed) == 4 else struct.pack(f"{order}I", after + len(values))
        values += b"" if len(packed) == 4 else packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(tags[tag])) + inline
    head = data[:2] + struct.pack(f"{order}HI", 42, begin)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return head + data[8:] + bytes(len(data) % 2) + directory + values
