"""The words of the house: shapes as types, and what a batch and a condition hold.

raw pixels   uint8 `(b, c, h, w)`, what data modules put on the wire
images       float in [-1, 1]
moments      mean and standard deviation of a latent, what a latent cache stores
latents      unit-variance tensors that a network sees
maps         feature maps inside a network; tokens and vectors likewise
output       of a network; twice the channels of its input with learned variance
noise level  the number a network reads: log-SNR, time or timestep, one per sample
features     of images, by a feature network, one row per image
"""

from dataclasses import dataclass, fields
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int, Real, UInt8
from torch import Tensor

__all__ = [
    "Batch",
    "Condition",
    "Data",
    "Features",
    "Images",
    "Labels",
    "Latents",
    "Maps",
    "Mask",
    "NoiseLevel",
    "Output",
    "PerSample",
    "RawPixels",
    "Time",
    "Times",
    "Tokens",
    "Vectors",
]

RawPixels = UInt8[Tensor, "b c h w"]
Images = Float[Tensor, "b c h w"]
Latents = Float[Tensor, "b c h w"]
Data = Float[Tensor, "b *shape"]
PerSample = Float[Tensor, "*b"]
Times = Float[Tensor, "*b"]
Time = Float[Tensor, ""]
NoiseLevel = Real[Tensor, "b"]
Labels = Int[Tensor, "b"]
Maps = Float[Tensor, "b c h w"]
Output = Float[Tensor, "b c2 h w"]
Tokens = Float[Tensor, "b n d"]
Vectors = Float[Tensor, "b e"]
Mask = Bool[Tensor, "b n"]
Features = Float[Tensor, "n d"]


class Batch(TypedDict, total=False):
    """What a data module yields. `image` is raw pixels; `moments` replaces it for cached latents.

    `index` is the position of each sample in the global order of the epoch-spanning stream, `id` the row it came
    from; both serve exact resume and error reports. `text` and `text_mask` are cached caption embeddings. Training adds
    `places`, `index` on its device.
    """

    image: Tensor
    moments: Tensor
    label: Tensor
    caption: list[str]
    text: Tensor
    text_mask: Tensor
    index: Tensor
    places: Tensor
    id: Tensor


@dataclass(frozen=True)
class Condition:
    """What a network is told besides the noise level. Every field is optional; all share the batch size.

    label:      class index `(b,)`, int64; where the network has a null class it is index `num_classes`.
    text:       caption embeddings `(b, n, d)`.
    text_mask:  True where a text token is real, `(b, n)`.
    low_res:    clean low-resolution images `(b, c, h', w')` in [-1, 1], for upsamplers.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    low_res: Tensor | None = None

    def __getitem__(self, index: slice | Tensor) -> "Condition":
        """The condition of a part of the batch."""
        return Condition(**{k: v[index] for k, v in self._present()})

    def __len__(self) -> int:
        for _, v in self._present():
            return len(v)
        return 0

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device."""
        return Condition(**{k: v.to(device) for k, v in self._present()})

    def _present(self) -> list[tuple[str, Tensor]]:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(k, v) for k, v in pairs if v is not None]

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """This condition where `keep` `(b,)` is true, `other` elsewhere; both must have the same fields."""
        mine, theirs = dict(self._present()), dict(other._present())
        if mine.keys() != theirs.keys():
            raise ValueError(f"cannot mix conditions with different fields: {sorted(mine)} and {sorted(theirs)}")
        pick = {k: keep.reshape(keep.shape + (1,) * (v.ndim - 1)) for k, v in mine.items()}
        return Condition(**{k: torch.where(pick[k], v, theirs[k]) for k, v in mine.items()})

    @staticmethod
    def cat(first: "Condition", second: "Condition") -> "Condition":
        """Both batches one after the other; they must have the same fields."""
        a, b = dict(first._present()), dict(second._present())
        if a.keys() != b.keys():
            raise ValueError(f"cannot join conditions with different fields: {sorted(a)} and {sorted(b)}")
        return Condition(**{k: torch.cat([a[k], b[k]]) for k in a})
