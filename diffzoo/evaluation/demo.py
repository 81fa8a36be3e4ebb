"""The reference of the protocol "demo": made on this machine from the demo set, at the size of the images."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from diffzoo.data.sources import Source
from diffzoo.evaluation.image_files import FolderImages
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.evaluation.reference import Reference, find_reference, make_reference, reference_folder
from diffzoo.metrics.features import load_features
from diffzoo.sizes import Size, size_text

__all__ = ["is_made", "open_reference"]

PER_CLASS = 100  # its classes are of unequal size, the plan samples them equally often


def open_reference(
    protocol: EvalProtocol, path: str | None, size: Size
) -> tuple[EvalProtocol, Reference | FolderImages]:
    """The reference of a protocol; that of the demo is made where it is missing.

    Args:
        protocol: names its reference.
        path: of another reference or of a folder of images, or None.
        size: of the images in pixels.

    Returns:
        The protocol, which for the demo names the reference of that size, and the open reference.
    """
    if not is_made(protocol, path):
        return protocol, find_reference(protocol.reference, path)
    protocol = replace(protocol, reference=f"diffzoo-demo-{size_text(size)}", image_size=size)
    file = reference_folder() / f"{protocol.reference}.npz"
    if not file.exists():
        _make(file, size)
    return protocol, find_reference(protocol.reference)


def is_made(protocol: EvalProtocol, path: str | None) -> bool:
    """Whether the reference of a protocol is made where it is missing."""
    return protocol.name == "demo" and path is None


def _make(path: Path, size: Size) -> None:
    from diffzoo.data.demo import DemoData

    class Whole(DemoData):
        """The training rows, each once and in order, through the loader that validation has."""

        def open_source(self, part: Literal["train", "validation"]) -> Source:
            return super().open_source("train")

    batches = Whole(image_size=size, num_workers=0).val_dataloader()
    make_reference(_equal_classes(batches), [load_features("random-conv")], path)


def _equal_classes(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The first images of each class, as many of each as there are, up to PER_CLASS."""
    seen: dict[int, int] = {}
    for batch in batches:
        keep = []
        for i, label in enumerate(batch["label"].tolist()):
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= PER_CLASS:
                keep.append(i)
        if keep:
            yield {"image": batch["image"][keep], "label": batch["label"][keep]}
