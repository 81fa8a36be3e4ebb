"""Images and how they were made, and their way into files."""

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from diffzoo.images import make_grid, png_bytes, save_image, write_npz

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Samples"]


@dataclass(eq=False, repr=False)
class Samples:
    """Images and how they were made.

    pixels:  uint8 `(n, h, w, 3)`, a NumPy array.
    labels:  a readable label for each image.
    records: how each was made, as plain data.
    columns: images per row of `grid`.
    heads:   what to write above the columns.
    """

    pixels: np.ndarray
    labels: list[str]
    records: list[dict[str, Any]]
    columns: int
    heads: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels.astype(dtype) if dtype is not None else self.pixels

    def pil(self) -> "list[Image]":
        """The images as PIL images."""
        from PIL.Image import fromarray

        return [fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in self.pixels]

    def save_png(self, folder: str | Path) -> list[Path]:
        """One PNG per image, its record in the metadata field "diffzoo" as JSON; returns the paths.

        Images are saved with the channels that they have. Of more than four they are `.npy`, the records beside them.

        Files are named by label and seed, and numbered where these are alike.
        """
        paths: list[Path] = []
        taken: set[str] = set()
        for image, label, record in zip(self._planar(), self.labels, self.records, strict=True):
            stem = "_".join(part for part in (_file_part(label), f"seed{record['seed']}") if part)
            numbered = (f"{stem}_{i}" for i in itertools.count(2))
            name = next(n for n in itertools.chain([stem], numbered) if n not in taken)
            taken.add(name)
            suffix = "png" if len(image) <= 4 else "npy"
            paths.append(save_image(image, Path(folder) / f"{name}.{suffix}", _text(record)))
        return paths

    def save_grid(self, path: str | Path) -> Path:
        """All images in one file, a row per class, labelled, with the records of all in its metadata."""
        return save_image(self.grid(), path, _text(self.records))

    def grid(self) -> UInt8[Tensor, "3 H W"]:
        """All images in one, a row per class, each with its class or caption and its seed."""
        return make_grid(self._planar(), self.columns, labels=self.titles, heads=self.heads)

    @property
    def titles(self) -> list[str]:
        """Class or caption and seed of each image."""
        return [
            ", ".join(filter(None, (label, f"seed {r['seed']}")))
            for label, r in zip(self.labels, self.records, strict=True)
        ]

    def _repr_png_(self) -> bytes:
        """The grid, as notebooks show it."""
        return png_bytes(self.grid())

    def save_npz(self, path: str | Path) -> Path:
        """All images as the ADM evaluator reads them: `arr_0`, and the classes as `arr_1` where there are any."""
        classes = [record["class_id"] for record in self.records if "class_id" in record]
        labels = torch.tensor(classes) if len(classes) == len(self) else None
        return write_npz(path, self._planar().split(1000), len(self), labels)

    def _planar(self) -> Tensor:
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)

    def __repr__(self) -> str:
        n, h, w, _ = self.pixels.shape
        return f"Samples({n} of {h}x{w})"


def _text(record: object) -> dict[str, str]:
    return {"diffzoo": json.dumps(record, sort_keys=True, allow_nan=False)}


def _file_part(label: str) -> str:
    """The letters and digits of a label, of any script; a long one is cut and ends in a hash of the whole."""
    text = unicodedata.normalize("NFC", label.casefold())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    part = "_".join(word for word in words if any(map(str.isalnum, word)))
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # a locale without these letters
        part = part.encode("ascii", "ignore").decode().strip("_")
    if len(part) <= 60 and len(part.encode()) <= 180:  # a file system takes 255 bytes
        return part
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{part[:51].encode()[:171].decode(errors='ignore').rstrip('_')}_{digest}"
