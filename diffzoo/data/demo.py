"""The demo set that ships with the package."""

from pathlib import Path
from typing import Any, Literal

from diffzoo.cache import cache_dir
from diffzoo.data.base import ImageDataModule
from diffzoo.data.metadata import Columns
from diffzoo.data.sources import Origin, Source
from diffzoo.data.tables import TableSource, rows_with
from diffzoo.errors import UserError
from diffzoo.sizes import Size, as_size, sides

__all__ = ["DemoData"]

PATH = Path(__file__).parent / "demo" / "fluent_emoji_64.parquet"
SIZE, LARGEST = 64, 256  # pixels of what ships, and of the originals


def demo_file(size: int) -> Path:
    """The Parquet file of images of at least `size` px: what ships, or what `tools/build_demo.py` wrote."""
    return PATH if size <= SIZE else cache_dir() / "demo" / f"fluent_emoji_{LARGEST}.parquet"


class DemoData(ImageDataModule):
    """3,374 of Microsoft's Fluent emoji (MIT) at 64×64 on white, in ten classes, each with a caption.

    Captions are the short names of Unicode's CLDR, such as "red heart" or "waving hand: light skin tone". Classes are
    Unicode's nine categories that have images here, with "People & Body" in its two halves. 374 images are held out:
    one emoji in ten with all its skin tones. Licence and attribution lie beside the file; `tools/build_demo.py` builds
    it from the published packages.

    Args:
        image_size: up to 64; 32 for the quickstart. Up to 256 once `tools/build_demo.py --size 256` has written the
            originals to the cache.
        balance: show classes equally often (default): people are nearly half of the images.
        **common: see `ImageDataModule`.
    """

    def __init__(
        self,
        image_size: Size = 64,
        batch_size: int = 64,
        balance: bool = True,
        flip: bool = False,
        **common: Any,
    ):
        side = max(sides(as_size(image_size)))
        self.file = demo_file(side)
        if side > LARGEST:
            raise UserError(
                f"the demo images are {LARGEST} px wide, so image_size is at most {LARGEST}, got {image_size}"
            )
        if not self.file.exists():
            raise UserError(
                f"the demo images that ship are {SIZE} px wide, image_size is {image_size}: "
                f"tools/build_demo.py --size {LARGEST} writes larger ones to {self.file}"
            )
        if common.get("val_fraction"):
            raise UserError("the demo set holds out images of its own: leave val_fraction out")
        super().__init__(image_size=image_size, batch_size=batch_size, balance=balance, flip=flip, **common)

    def open_source(self, part: Literal["train", "validation"]) -> Source:
        columns = Columns("image", "label", "caption")
        whole = TableSource([str(self.file)], columns, "the demo set", origin=Origin(licence="MIT"))
        return rows_with(whole, {"split": part})
