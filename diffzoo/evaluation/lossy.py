"""How image files were saved: lossy compression alone moves a Fréchet distance, so a result says so.

`benchmarks/saved_images.py` measures by how much; its table is in docs/evaluate.md.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["lossy_remark"]

LOOKED_AT = 256  # files of a folder, evenly spread
# sum of the luminance table of quality 50 (ITU-T T.81, Table K.1)
LUMINANCE_SUM = 3689


def lossy_remark(files: Sequence[Path], what: str) -> str | None:
    """A sentence about files that were saved with loss; None if there are none.

    Args:
        files: image files; about 256 of them, evenly spread, are looked at.
        what: they are, for the sentence.
    """
    step = max(1, len(files) // LOOKED_AT)
    looked = files[::step]
    found = Counter(kind for kind in map(_kind, looked) if kind is not None)
    if not found:
        return None
    kinds = ", ".join(f"{kind} ({100 * count / len(looked):.0f} %)" for kind, count in found.most_common(3))
    return f"{what} were saved with loss, which alone moves a Fréchet distance: {kinds}; compare with lossless ones"


def _kind(path: Path) -> str | None:
    """Format and quality of a lossy file; None for a lossless one."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:2] == b"\xff\xd8":
        return f"JPEG of quality {jpeg_quality(path)}"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP" if b"VP8 " in head else None
    return "AVIF" if head[4:12] in (b"ftypavif", b"ftypavis") else None


def jpeg_quality(path: Path) -> int:
    """The quality of a JPEG, 1 to 100, from its first quantisation table.

    Encoders that follow the Independent JPEG Group scale the table of quality 50 by 2 - quality / 50 above it and by
    50 / quality below; the sum of the table gives the factor back. Other encoders have tables of their own, for which
    this is the nearest.
    """
    from PIL import Image

    with Image.open(path) as image:
        tables = getattr(image, "quantization", {})
    scale = 100 * sum(next(iter(tables.values()))) / LUMINANCE_SUM
    return round(max(1.0, min(100.0, (200 - scale) / 2 if scale <= 100 else 5000 / scale)))
