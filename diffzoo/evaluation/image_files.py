"""Images that exist already: folders of files and ADM-style `.npz` files.

An ADM `.npz` holds `arr_0`, uint8 NHWC, and `arr_1`, labels. It may be larger than the memory: both directions stream.
"""

import hashlib
import os
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.evaluation.lossy import lossy_remark
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.files import sha256
from diffzoo.generation.plan import Record
from diffzoo.images import SUFFIXES
from diffzoo.metrics.resize import resize_bicubic
from diffzoo.sizes import Size, as_size, pixels_text, sides

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FolderImages", "ImagesPlan", "NpzImages", "array_header", "as_protocol_asks", "open_images"]

# of a member of a zip file; at the end the lengths of the name and of the extra field, which lie before the data
LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def as_protocol_asks(pixels: Tensor, protocol: EvalProtocol, where: str = "the images") -> Tensor:
    """Raw pixels `(b, 3, h, w)` of the protocol's size, or a `UserError`."""
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    if pixels.shape[1] != 3:
        raise UserError(f"{where} have {pixels.shape[1]} channels; the protocol {protocol.name} measures RGB")
    size = protocol.image_size
    if size is None or tuple(pixels.shape[-2:]) == sides(size):
        return pixels
    if protocol.resize == "none":
        own = pixels_text(as_size(list(pixels.shape[-2:])))
        raise UserError(
            f"{where} are {own} pixels; the protocol {protocol.name} measures {pixels_text(size)} and does not "
            "resize, since every way to do so gives other numbers: give images of that size, or choose another protocol"
        )
    return resize_bicubic(pixels.float(), size).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ImagesPlan(Record):
    """Images that exist already.

    Args:
        images: the folder or file they came from.
        images_sha256: hash of the file, or of the names and contents of the folder's files; filled in on reading.
    """

    images: str
    images_sha256: str | None = None


# -- reading


@dataclass(frozen=True)
class FolderImages:
    """The images in a folder and below it, in the order of their paths.

    Args:
        path: the folder.
    """

    path: str

    @cached_property
    def files(self) -> list[Path]:
        """The image files.

        Raises:
            UserError: if there are none, or other files among them.
        """
        return _image_files(self.path)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def image_size(self) -> Size:
        """Height and width of the first image in pixels."""
        return as_size(list(self.images(0, 1).shape[-2:]))

    def images(self, start: int, count: int) -> Tensor:
        """Raw pixels of some images, `(count, 3, h, w)`.

        Raises:
            UserError: for a file that cannot be read or has another size than the first.
        """
        rows = [_read_image(p) for p in self.files[start : start + count]]
        first = _read_image(self.files[0]).shape
        for path, row in zip(self.files[start : start + count], rows, strict=True):
            if row.shape != first:
                raise UserError(
                    f"{path.name} is {row.shape[0]}x{row.shape[1]} pixels and {self.files[0].name} is "
                    f"{first[0]}x{first[1]}: all images of an evaluation have one size; `diffzoo data stats FOLDER "
                    "--size N --out FILE.npz` makes a reference of images of several"
                )
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)

    def remarks(self) -> list[str]:
        """What a reader of a result should know about the files."""
        remark = lossy_remark(self.files, f"the images in {self.path}")
        return [] if remark is None else [remark]

    @cached_property
    def sha256(self) -> str:
        """Hash of the names and contents of the files."""
        hashed = hashlib.sha256()
        for file in self.files:
            hashed.update(f"{file.relative_to(self.path)}:{sha256(file)}\n".encode())
        return hashed.hexdigest()

    def plan(self) -> ImagesPlan:
        """Which images these are."""
        return ImagesPlan(self.path, self.sha256)


def _image_files(folder: str) -> list[Path]:
    """The image files in a folder and below it, or a `UserError`."""
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    other = [p for p in found if p.suffix.lower() not in SUFFIXES]
    if other:
        raise UserError(
            f"{folder} holds {len(other)} files that are no images, for example {other[0].name!r}: "
            f"give a folder of images alone ({', '.join(sorted(SUFFIXES))})"
        )
    if not found:
        raise UserError(f"{folder} holds no images: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return found


def _read_image(path: Path) -> np.ndarray:
    """uint8 `(h, w, 3)`, or a `UserError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            _check_mode(path, image)
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{path} is no image, or a damaged one ({error}): remove it or write it again") from error


def _check_mode(path: Path, image: "Image.Image") -> None:
    """Refuse images without one obvious conversion to 8-bit RGB: the choice would be a hidden part of the protocol."""
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
        raise UserError(f"{path} has pixels of mode {image.mode}, not 8 bits: convert it to 8-bit RGB first")
    if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise UserError(f"{path} is partly transparent: put it on a background of your choice first")


def array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype of a `.npy` file, which is then read up to its data."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _member_bytes(path: str, name: str, start: int, count: int) -> bytes:
    """Some bytes of a member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        if info.compress_type == zipfile.ZIP_STORED:
            # a seek through the archive would read all that lies before
            with open(path, "rb") as file:
                file.seek(info.header_offset)
                *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                file.seek(name_length + extra_length + start, os.SEEK_CUR)
                return file.read(count)
        with archive.open(info) as member:
            member.seek(start)
            return member.read(count)


def _raw_pixels(values: np.ndarray, path: str) -> np.ndarray:
    """uint8, or a `UserError` for values that are not finite or not in 0..255."""
    if values.dtype == np.uint8:
        return values.copy()
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are not finite (NaN): sample the images again")
    if values.size and (values.min() < 0 or values.max() > 255 or values.max() <= 1):
        raise UserError(f"{path}: expected pixels in 0..255, got {values.min():g} to {values.max():g}; write uint8")
    return values.round().astype(np.uint8)


@dataclass(frozen=True)
class NpzImages:
    """The images of an ADM `.npz` file, read piece by piece.

    Args:
        path: the file.
    """

    path: str

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, dtype and offset of the data within the member `arr_0.npy`."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                shape, fortran, dtype = array_header(member)
                offset = member.tell()
        except (KeyError, ValueError, zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"{self.path} holds no images: expected an .npz file with the array arr_0, uint8 (n, h, w, 3)"
            ) from error
        if fortran or len(shape) != 4 or shape[-1] not in (1, 3) or dtype.kind not in "uif":
            raise UserError(f"{self.path}: expected arr_0 of shape (n, h, w, 3), got {shape} of {dtype}")
        return shape, dtype, offset

    def __len__(self) -> int:
        return int(self._header[0][0])

    @property
    def image_size(self) -> Size:
        """Height and width of the images in pixels."""
        return as_size([int(side) for side in self._header[0][1:3]])

    def images(self, start: int, count: int) -> Tensor:
        """Raw pixels of some images, `(count, 3, h, w)`.

        Raises:
            UserError: for values that are not finite or not in 0..255.
        """
        shape, dtype, offset = self._header
        count = max(0, min(count, shape[0] - start))
        row = int(np.prod(shape[1:])) * dtype.itemsize
        data = _member_bytes(self.path, "arr_0.npy", offset + start * row, count * row)
        values = np.frombuffer(data, dtype).reshape(count, *shape[1:])
        return torch.from_numpy(_raw_pixels(values, self.path)).permute(0, 3, 1, 2)

    def remarks(self) -> list[str]:
        """What a reader of a result should know: of pixels alone, nothing."""
        return []

    def plan(self) -> ImagesPlan:
        """Which images these are."""
        return ImagesPlan(self.path, sha256(self.path))


def open_images(path: str | os.PathLike[str]) -> FolderImages | NpzImages:
    """Images in a folder or an `.npz` file."""
    if Path(path).is_dir():
        return FolderImages(str(path))
    if Path(path).suffix == ".npz" and Path(path).exists():
        return NpzImages(str(path))
    state = "is neither" if Path(path).exists() else "does not exist"
    raise UserError(f"{path} {state}: expected a folder of images or an .npz file")
