"""Input transforms: invertible maps from an image to fewer, deeper pixels.

`none` leaves the image as it is; `patch-p` moves blocks of p x p pixels into the channels (with a 1x1 convolution
after it this is the convolution of size and stride p of ViT, and its inverse after one is the transposed
convolution); `dwt-n` is n levels of the LeGall 5/3 wavelet (`wavelet.py`).
"""

import re

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffzoo.errors import UserError
from diffzoo.nn.wavelet import dwt, idwt
from diffzoo.typing import Images, Maps, Tokens

__all__ = ["InputTransform", "from_patches", "transform_factor"]

_FORM = re.compile(r"none|(patch|dwt)-([1-9]\d?)")


def _parse(name: str) -> tuple[str, int]:
    match = _FORM.fullmatch(name)
    if match is None:
        raise UserError(
            f"unknown input_transform {name!r}: expected 'none', 'patch-p' (such as 'patch-2') or 'dwt-levels' "
            "(such as 'dwt-1')"
        )
    kind, number = match.groups()
    return kind or "none", int(number or 1)


def transform_factor(name: str) -> int:
    """The factor by which height and width shrink.

    Raises:
        UserError: if the name is not one of the forms above.
    """
    kind, number = _parse(name)
    return 2**number if kind == "dwt" else number


def from_patches(x: Tokens, rows: int, patch: int) -> Images:
    """Tokens `(b, rows columns, (row, column, channel))`, row by row, to an image `(b, c, rows p, columns p)`."""
    x = x.unflatten(1, (rows, -1)).unflatten(-1, (patch, patch, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class InputTransform(nn.Module):
    """`none`, `patch-p` or `dwt-n`: `(b, c, h, w)` to `(b, c f^2, h/f, w/f)`, and back. It has no parameters."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.factor = name, transform_factor(name)
        self.kind, self.number = _parse(name)
        # after patching, the neighbourhood is already in the channels
        self.kernel_size = 1 if self.kind == "patch" else 3

    def forward(self, x: Images) -> Float[Tensor, "b c2 h2 w2"]:
        if self.kind == "dwt":
            return dwt(x, self.number)
        return F.pixel_unshuffle(x, self.factor) if self.factor > 1 else x

    def inverse(self, y: Maps) -> Float[Tensor, "b c2 h2 w2"]:
        """The exact inverse of `forward`."""
        if self.kind == "dwt":
            return idwt(y, self.number)
        return F.pixel_shuffle(y, self.factor) if self.factor > 1 else y

    def extra_repr(self) -> str:
        return repr(self.name)
