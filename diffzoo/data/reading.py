"""How rows are read and decoded: settings that most recipes leave alone, and the value range of deep images."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Literal

from diffzoo.data.decode import Bands, ValueRange, has_more_frames, load, range_of
from diffzoo.data.sources import Source
from diffzoo.data.transforms import Crop, Resize
from diffzoo.errors import UserError, check_choice

__all__ = ["Reading", "check_positive", "range_of_source"]

LOOKED_AT = 16  # images from which the value range is estimated
OnBadImage = Literal["skip", "error"]


@dataclass(frozen=True)
class Reading:
    """How rows are read and decoded.

    Args:
        crop: "center" or "random" (training only).
        resize: "adm", "area" or "lanczos"; see `diffzoo.data.transforms`.
        fast_jpeg: decode large JPEGs at reduced scale; faster, pixels differ slightly.
        value_range: the values that become black and white in images of more than eight bits; None: as the files state
            it, or the smallest usual range that holds some of them, see `decode.range_of`.
        on_bad_image: "skip": replace what cannot be decoded by a neighbour, and leave it out of the held-out images;
            "error": stop at it.
        max_bad: with "skip", how many different bad images are tolerated in training, over all its resumes, and how
            many among those held out.
        shuffle_window: how many rows of a source without random access are mixed at a time.
        lanes: about how many blocks of such a source are open at a time, over all ranks and workers.
        streaming: read published files over the network as needed; False: download them into the Hub cache first.
        val_fraction: what part of the rows is held out where no split is, by the hash of their names; every class keeps
            a row to train on.
        allow_changed_source: resume on a source that is no longer the one in the checkpoint.
    """

    crop: Crop = "center"
    resize: Resize = "adm"
    fast_jpeg: bool = False
    value_range: ValueRange | None = None
    on_bad_image: OnBadImage = "skip"
    max_bad: int = 100
    shuffle_window: int = 8192
    lanes: int = 64
    allow_changed_source: bool = False
    streaming: bool = True
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_choice("crop", self.crop, Crop)
        check_choice("resize", self.resize, Resize)
        check_choice("on_bad_image", self.on_bad_image, OnBadImage)
        check_positive({"lanes": self.lanes})
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction lies in [0, 1), got {self.val_fraction}")
        if self.value_range is not None:
            low, high = self.value_range
            object.__setattr__(self, "value_range", (float(low), float(high)))


def check_positive(numbers: dict[str, int]) -> None:
    """Refuse numbers below one, by name."""
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is a positive whole number, got {value}")


def range_of_source(source: Source) -> ValueRange | None:
    """The value range of deep images, from what some of them state and hold; None where there are none.

    A source that is read block by block is not sampled: the range is chosen for each of its images. Files with several
    frames among those that are looked at give a warning.
    """
    if not source.random_access:
        return None
    lows: list[float] = []
    highs: list[float] = []
    several: list[str] = []
    for k in range(min(LOOKED_AT, len(source))):
        with contextlib.suppress(Exception):  # bad images are reported when they are served
            record = source.read_row(len(source) * k // min(LOOKED_AT, len(source)))
            image = load(record.image or b"", draft=64)
            if isinstance(image, Bands) and image.deep:
                low, high = image.stated or image.extremes()
                lows, highs = [*lows, low], [*highs, high]
            several += [record.name] * has_more_frames(record.image or b"")
    if several:
        warnings.warn(f"only the first frame or page of {several[0]} and others like it is read: split them into files")
    if not lows:
        return None
    found = range_of(min(lows), max(highs))
    warnings.warn(
        f"the images of {source.name} have more than eight bits: {found[0]:g} becomes black and {found[1]:g} white, as "
        f"{len(lows)} of them hold {min(lows):g} to {max(highs):g}; set value_range to say otherwise"
    )
    return found
