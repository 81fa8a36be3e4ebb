"""The contract of a batch: the first one of a loader decides its format, and later ones must keep it.

Inside, a batch is a dictionary:

    image     `(b, c, h, w)`, uint8, or floats in [-1, 1]; or `moments`, `(b, 2c, h, w)` floats, of cached latents
    label     `(b,)` integers from 0 to num_classes - 1
    caption   list of strings; or `text` and `text_mask`, encoded captions
    index     place of each sample in the global stream, `id` number of its row; both stay on the host
    places    `index` once more, on the device

The data modules of diffzoo give exactly that. Of other loaders, usual names and `(image, label)` tuples are understood,
and floats in [0, 1] or [0, 255] are scaled. The first batch decides the range, and the decision is printed.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from diffzoo import rng
from diffzoo.errors import UserError
from diffzoo.models.base import Config
from diffzoo.sizes import Size, sides, size_text
from diffzoo.training.steps import say
from diffzoo.typing import Batch

__all__ = ["BatchFormat", "BatchReader", "check_data_fits", "size_of"]

NAMES = {
    "image": ("images", "img", "pixel_values", "x", "input", "jpg", "png", "webp"),
    "label": ("labels", "class_label", "class_labels", "target", "targets", "y", "cls"),
    "caption": ("captions", "prompt", "prompts", "txt"),
}
_TOLERANCE = 0.05  # augmentation and resizing overshoot a little
_CONTRADICTION = 1.5  # of images in [-1, 1], after the first batch: far more than they overshoot


@dataclass(frozen=True)
class BatchFormat:
    """How the batches of a loader become ours.

    Args:
        names: ours to the loader's, a key or the place in a tuple.
        scale, shift: images are `image * scale + shift`; (1, 0) leaves them as they are.
        classes: how many the network has; 0 = labels are not looked at.
        raw: whether images are uint8.
    """

    names: Mapping[str, str | int]
    scale: float
    shift: float
    classes: int
    raw: bool

    @property
    def note(self) -> str:
        """How images are scaled; empty if they are not."""
        if self.scale == 1:
            return ""
        return f"images are in [0, {1 if self.scale == 2 else 255}]: they are scaled to [-1, 1]"

    def read(self, batch: object) -> Batch:
        """A batch of this loader in our form, on the host.

        Raises:
            UserError: for labels or values that do not fit the format.
        """
        parts = _parts(batch)
        ours = {name: parts.pop(key) for name, key in self.names.items()}
        found = cast(Batch, parts | ours)
        if "image" in found:
            found["image"] = self._scaled(found["image"])
        if self.classes:
            found["label"] = _labels(found["label"], self.classes)
        sized = ("image", "moments", "caption", *["label"] * bool(self.classes))
        counts = {name: len(cast(Sized, found[name])) for name in sized if found.get(name) is not None}  # type: ignore[literal-required]
        if len({*counts.values()}) > 1:
            raise UserError(f"a batch holds {', '.join(f'{n} of {name}' for name, n in counts.items())}")
        return found

    def _scaled(self, image: Tensor) -> Tensor:
        """Images as the first batch was scaled."""
        if self.raw:
            if image.dtype != torch.uint8:
                raise UserError(f"images were uint8 in the first batch and are {_kind(image)} in a later one: give one")
            return image
        image = image if self.scale == 1 else image.float() * self.scale + self.shift
        if image.device.type == "cpu" and image.numel():
            low, high = (float(v) for v in image.aminmax())
            if max(-low, high) > _CONTRADICTION or image.dtype == torch.uint8:
                low, high = ((v - self.shift) / self.scale for v in (low, high))
                raise UserError(
                    f"{self.note or 'images are floats in [-1, 1]'}, as the first batch was; a later one holds "
                    f"{low:.3g} to {high:.3g}: give floats in [-1, 1], or uint8"
                )
        return image


def size_of(batch: object) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next((len(v) for v in _parts(batch).values() if isinstance(v, Tensor)), 0)


def _parts(batch: object) -> dict[str | int, object]:
    """The parts of a batch by key, or by place in a tuple."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return dict(enumerate(batch if isinstance(batch, Sequence) else [batch]))


def format_of(batch: object, config: Config, latent: bool, where: str, sizes: Sequence[Size] = ()) -> BatchFormat:
    """The format of a loader, from its first batch on the host.

    `latent` says that images are encoded before the network sees them; `sizes` are allowed besides the network's.

    Raises:
        UserError: for what cannot be trained on, saying what was expected.
    """
    names, parts = _names(batch, where), _parts(batch)
    scale, shift, raw = 1.0, 0.0, False
    if "image" in names:
        image = cast(Tensor, parts[names["image"]])
        _check_shape(image, config, latent, where, (config.image_size, *sizes))
        scale, shift = _range(image, where)
        raw = image.dtype == torch.uint8
    if config.num_classes and ("label" not in names or parts[names["label"]] is None):
        held_out = ", leave validation out (data.init_args.val_split: null)" * (where == "validation")
        raise UserError(
            f"the network has {config.num_classes} classes but the {where} batches have no label: give `label`, "
            f"class numbers{held_out}, or set model.network_args.num_classes to 0"
        )
    return BatchFormat(names, scale, shift, config.num_classes, raw)


def _names(batch: object, where: str) -> dict[str, str | int]:
    if isinstance(batch, Tensor):
        return {"image": 0}
    if isinstance(batch, Sequence) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        second = {} if len(batch) == 1 else {"label" if isinstance(batch[1], Tensor) else "caption": 1}
        return {"image": 0, **second}
    if not isinstance(batch, Mapping):
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
        raise UserError(
            f"{where} batches: expected a dictionary with `image` (and `label` or `caption`) or an (image, label) "
            f"tuple of tensors, got a {what}"
        )
    names: dict[str, str | int] = {}
    for name, others in NAMES.items():
        key = next((k for k in (name, *others) if k in batch), None)
        if key is not None:
            names[name] = key
    text = batch.get("text")
    if "caption" not in names and isinstance(text, Sequence) and all(isinstance(t, str) for t in text):
        names["caption"] = "text"
    if "image" not in names and "moments" not in batch:
        raise UserError(
            f"{where} batches have no images: expected `image` (or {', '.join(NAMES['image'])}) or `moments`, got "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    if "image" in names and not isinstance(batch[names["image"]], Tensor):
        raise UserError(
            f"{where} batches: expected `{names['image']}` to be a tensor (b, c, h, w), got "
            f"{type(batch[names['image']]).__name__}: turn images into tensors in the dataset"
        )
    return names


def _check_shape(image: Tensor, config: Config, latent: bool, where: str, sizes: tuple[Size, ...]) -> None:
    channels, (height, width) = (3 if latent else config.in_channels), config.sides
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[1] == channels and (latent or shape[2:] in map(sides, sizes)):
        return
    hint = ""
    if len(shape) == 4 and shape[3] == channels != shape[1]:
        hint = ": put the channels first"
    elif len(shape) == 4 and not latent:
        settings = ("in_channels", "channels") if shape[1] != channels else ("image_size", "image_size")
        hint = ": {} of the network and {} of the data have to agree".format(*settings)
    expected = f"(b, {channels}, h, w)" if latent else f"(b, {channels}, {height}, {width})"
    raise UserError(f"{where} batches: expected images of shape {expected}, got {shape}{hint}")


def _range(image: Tensor, where: str) -> tuple[float, float]:
    """Scale and shift that bring images to [-1, 1]; uint8 is scaled where it is used."""
    low, high = (float(v) for v in image.float().aminmax())
    whole = not image.is_floating_point() and image.dtype != torch.bool
    if whole and (high > 1 or not high) and 0 <= low <= high <= 255:
        return (1.0, 0.0) if image.dtype == torch.uint8 else (1 / 127.5, -1.0)
    if not whole and -1 - _TOLERANCE <= low < -_TOLERANCE and high <= 1 + _TOLERANCE:
        return 1.0, 0.0
    if not whole and low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
        return 2.0, -1.0
    if not whole and 0 <= low <= high <= 255:
        return 1 / 127.5, -1.0
    raise UserError(
        f"{where} batches: expected images as uint8 or as floats in [-1, 1], [0, 1] or [0, 255], got {_kind(image)} "
        f"between {low:.3g} and {high:.3g}: "
        + ("scale them" if whole else "leave out a normalisation by mean and standard deviation")
    )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _labels(label: Tensor | Sequence[object], classes: int) -> Tensor:
    if not isinstance(label, Tensor):
        label = torch.as_tensor(label) if all(isinstance(v, Integral) for v in label) else label
    expected = f"labels: expected class numbers from 0 to {classes - 1}, integers of shape (b,), got "
    if not isinstance(label, Tensor):
        raise UserError(f"{expected}{type(label[0]).__name__}")
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.ndim != 1:
        hint = ": take argmax(1) of one-hot labels" if label.shape[1:] == (classes,) else ""
        raise UserError(f"{expected}shape {tuple(label.shape)}{hint}")
    if label.is_floating_point() or label.dtype == torch.bool:
        raise UserError(f"{expected}{_kind(label)}")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= classes:
        raise UserError(f"{expected}{low if low < 0 else high}: set model.network_args.num_classes")
    return label.long()


class BatchReader:
    """Reads the batches of every loader of a run, each in the format that its first batch decides.

    `latent` says that an autoencoder stands between the images and the network; `sizes` are the buckets of the data.
    """

    def __init__(self, config: Config, latent: bool):
        self.config, self.latent = config, latent
        self.sizes: tuple[Size, ...] = ()
        self._formats: dict[tuple[str, int], BatchFormat] = {}

    def read(self, batch: object, where: str, loader: int, device: torch.device) -> Batch:
        """A batch of a loader in our form on `device`; row ids stay on the host, which reports them.

        `where` is "training" or "validation", `loader` the number of the loader there.
        """
        known = self._formats.get((where, loader))
        if known is None:
            known = self._formats[where, loader] = format_of(batch, self.config, self.latent, where, self.sizes)
            if known.note:
                say(f"{where} {known.note}")
        moved = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in ("index", "id") else v
            for k, v in known.read(batch).items()
        }
        found = cast(Batch, moved)
        if "index" in found:
            found["places"] = rng.places(found["index"], device)
        return found


def check_data_fits(data: object, config: Config, name: str, latent: bool) -> None:
    """Raise if a data module gives other classes or images of another size than the network expects.

    What the data does not say passes. `name` is that of the network, for messages.
    """
    classes = getattr(data, "num_classes", 0) or 0
    if config.num_classes and classes > config.num_classes:
        raise UserError(
            f"the data has {classes} classes but {name} has {config.num_classes}: "
            f"set model.network_args.num_classes to {classes}"
        )
    if config.num_classes and data is not None and not classes and hasattr(data, "num_classes"):
        raise UserError(
            f"{name} has {config.num_classes} classes but the data has none: "
            "set model.network_args.num_classes to 0, or use folders as classes"
        )
    size = getattr(data, "image_size", None)
    if not latent and size is not None and size != config.image_size:
        raise UserError(
            f"the data gives images of {size_text(size)} px but {name} expects {size_text(config.image_size)} px: "
            "set data.init_args.image_size or model.network_args.image_size"
        )
    for bucket in getattr(data, "buckets", ()):
        if any(side % config.cell for side in sides(bucket)):
            raise UserError(f"buckets: {name} takes multiples of {config.cell}, got {size_text(bucket)}")
