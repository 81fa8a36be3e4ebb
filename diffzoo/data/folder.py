"""A folder of one's own pictures."""

from typing import Any, Literal

from diffzoo.data.base import ImageDataModule
from diffzoo.data.sources import AUTO, FolderSource, Source, SubSource, held_out
from diffzoo.errors import UserError

__all__ = ["ImageFolder"]


class ImageFolder(ImageDataModule):
    """Pictures below a folder; sub-folders are classes, without any the data is unconditional.

    A text file beside a picture, `cat.txt` beside `cat.jpg`, holds its captions, one per line. Labels and captions may
    also stand in `metadata.jsonl` or `metadata.csv`, as in Hugging Face's `imagefolder`: each row names a picture in
    `file_name`, by its path from there, and pictures that no row names are left out.

    Args:
        path: the folder.
        val_path: folder of held-out pictures, with the same classes.
        val_fraction: without `val_path`, what part of the pictures is held out, chosen by the hash of their names.
        classes: whether sub-folders are classes; None: if there are any, and no metadata.
        label, caption: columns of the metadata; "auto" finds the usual names; None: leave out.
        **common: see `ImageDataModule`.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        val_fraction: float = 0.0,
        classes: bool | None = None,
        label: str | None = AUTO,
        caption: str | None = AUTO,
        **common: Any,
    ):
        super().__init__(**common)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction lies in [0, 1), got {val_fraction}")
        self.path, self.val_path, self.val_fraction, self.classes = path, val_path, val_fraction, classes
        self.columns = {"label": label, "caption": caption}

    def open_source(self, part: Literal["train", "validation"]) -> Source | None:
        if part == "validation" and self.val_path is not None:
            source = FolderSource(self.val_path, self.classes, **self.columns)
            if list(source.class_names) != self.class_names:
                raise UserError(
                    f"{self.val_path!r} has the classes {', '.join(source.class_names) or '(none)'} but "
                    f"{self.path!r} has {', '.join(self.class_names) or '(none)'}"
                )
            return source
        source = FolderSource(self.path, self.classes, **self.columns)
        if self.val_path is not None or not self.val_fraction:
            return source if part == "train" else None
        out = held_out(source.files, self.val_fraction)
        return SubSource(source, out if part == "validation" else ~out, f"{part} {self.val_fraction}")
