"""TIFF images of several channels that Pillow cuts to eight bits or does not read: with deep values, or many bands.

Pillow decodes every compression that libtiff knows, but only into its own modes. So the file is given to it as a grey
image with a pixel for every byte: the bytes of a strip or a tile are the same. What depends on the number of channels,
differences between neighbours, is left undone there and done here.
"""

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

__all__ = ["is_tiff", "read_bands", "tiff_tags"]

# the tags that matter, of TIFF 6.0
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIPS, SAMPLES, ROWS, SIZES, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, EXTRA, FORMAT = 322, 323, 324, 325, 338, 339
ALPHA = (1, 2)  # values of EXTRA
Tags = Mapping[int, Sequence[Any]]


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF, of 32 or 64 bits."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def tiff_tags(data: bytes) -> dict[int, tuple[Any, ...]]:
    """The values of every tag of the first image in a file."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return {tag: v if isinstance(v, tuple) else (v,) for tag, v in directory.items()}


def read_bands(data: bytes, tags: Tags) -> np.ndarray[Any, Any]:
    """The channels `(h, w, channels)` of a TIFF as they are.

    Raises:
        OSError, SyntaxError, ValueError: the file is truncated, or coded in a way that is not read.
    """
    count, predictor = int(tags.get(SAMPLES, (1,))[0]), int(tags.get(PREDICTOR, (1,))[0])
    if predictor == 3:
        raise ValueError(f"a TIFF of {count} channels with the predictor of floating point: write it without")
    planar = tags.get(PLANAR, (1,))[0] == 2
    offsets, sizes = (TILES, TILE_SIZES) if TILES in tags else (STRIPS, SIZES)
    parts = count if planar else 1
    each = len(tags[offsets]) // parts
    planes = []
    for part in range(parts):
        here = slice(part * each, (part + 1) * each)
        one = {**tags, offsets: tags[offsets][here], sizes: tags[sizes][here]}
        planes.append(_decoded(data, one, 1 if planar else count))
    values = np.concatenate(planes, axis=2)
    if predictor == 2:
        wide = int(tags[TILE_WIDTH][0]) if TILES in tags else values.shape[1]
        for left in range(0, values.shape[1], wide):
            part_ = values[:, left : left + wide]
            np.cumsum(part_, axis=1, dtype=values.dtype, out=part_)
    return values


def _decoded(data: bytes, tags: Tags, channels: int) -> np.ndarray[Any, Any]:
    """Strips or tiles as an array `(h, w, channels)`, without differences undone."""
    width, height, bits = int(tags[WIDTH][0]), int(tags[HEIGHT][0]), int(tags[BITS][0])
    kind = {1: "u", 2: "i", 3: "f"}.get(tags.get(FORMAT, (1,))[0])
    if bits % 8 or kind is None:
        raise ValueError(f"a TIFF of {channels} channels of {bits} bits: expected whole bytes, integers or floats")
    dtype = np.dtype(f"{'<' if data[:2] == b'II' else '>'}{kind}{bits // 8}")
    wider = channels * dtype.itemsize
    kept = (COMPRESSION, STRIPS, SIZES, ROWS, TILE_HEIGHT, TILES, TILE_SIZES)
    new: dict[int, Sequence[Any]] = {tag: tags[tag] for tag in kept if tag in tags}
    new |= {WIDTH: (width * wider,), HEIGHT: (height,), BITS: (8,), PHOTOMETRIC: (1,), SAMPLES: (1,)}
    if TILE_WIDTH in tags:
        new[TILE_WIDTH] = (int(tags[TILE_WIDTH][0]) * wider,)
    with Image.open(io.BytesIO(_with_tags(data, new)), formats=("TIFF",)) as image:
        values = np.frombuffer(image.tobytes(), dtype).reshape(height, width, channels)
    return values.astype(dtype.newbyteorder("="))


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
