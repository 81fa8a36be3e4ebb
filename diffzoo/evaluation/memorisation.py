"""Which generated images are copies of training images?

For every generated image, its nearest training image in a feature space, and how that distance compares with those
between different training images: a generated image that lies closer to a training image than training images lie to
each other deserves a look. The report is a table and an image of the closest pairs; it proves nothing by itself.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.evaluation.measure import PIECE, Pixels
from diffzoo.files import write_text
from diffzoo.images import make_grid, save_image
from diffzoo.metrics.features import FeatureNetwork, extract, load_features
from diffzoo.metrics.neighbours import nearest

__all__ = ["Memorisation", "report"]

QUANTILE = 0.01


@dataclass(frozen=True)
class Memorisation:
    """Nearest training images of all generated ones, closest first.

    Args:
        network: the feature space.
        sample: index of the generated image.
        training: index of its nearest training image.
        distance: between the two.
        threshold: the closest hundredth of training images lie nearer than this to another training image.
        picture: PNG of the closest pairs: generated, its three nearest training images.
    """

    network: str
    sample: list[int]
    training: list[int]
    distance: list[float]
    threshold: float
    picture: str

    @property
    def suspicious(self) -> int:
        """How many generated images lie nearer to a training image than the threshold."""
        return sum(d < self.threshold for d in self.distance)

    def summary(self) -> str:
        """One sentence for people."""
        return (
            f"{self.suspicious} of {len(self.sample)} images lie nearer to a training image ({self.network}) than "
            f"{1 - QUANTILE:.0%} of training images lie to each other; the closest pairs: {self.picture}"
        )


def _features(pixels: Pixels, network: FeatureNetwork, layer: str) -> Tensor:
    starts = range(0, len(pixels), PIECE)
    return torch.cat([extract(network, pixels.images(i, PIECE))[layer] for i in starts])


def report(
    samples: Pixels,
    training: Pixels,
    network: str,
    folder: str | Path,
    *,
    weights: str | None = None,
    pairs: int = 16,
    device: str = "cpu",
) -> Memorisation:
    """Write `memorisation.json` and `memorisation.png` into a folder.

    Args:
        samples: generated images.
        training: training images; all of them, or copies go unseen.
        network: feature network to measure distances in.
        folder: where.
        weights: path of the network's weights.
        pairs: rows of the image.
        device: where to compute.

    Raises:
        UserError: without images, or of different sizes.
    """
    if not len(samples) or len(training) < 2:
        raise UserError(
            f"a memorisation report needs images on both sides, got {len(samples)} generated and {len(training)} "
            "training images"
        )
    sizes = [tuple(p.images(0, 1).shape[1:]) for p in (samples, training)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the generated images are {sizes[0]} and the training images {sizes[1]}: use equal sizes")
    net = load_features(network, weights, device)
    layer = "image" if "image" in net.dims else "pool"
    x, y = (_features(p, net, layer).to(device) for p in (samples, training))
    distance, index = (v.cpu() for v in nearest(x, y, 3))
    own = nearest(y, y, 2)[0][:, 1]  # the nearest is the image itself
    order = distance[:, 0].argsort(stable=True)
    picture = save_image(_pairs(samples, training, order[:pairs], index, distance), Path(folder) / "memorisation.png")
    found = Memorisation(
        network,
        order.tolist(),
        index[order, 0].tolist(),
        distance[order, 0].tolist(),
        float(own.quantile(QUANTILE)),
        str(picture),
    )
    write_text(Path(folder) / "memorisation.json", _json(found))
    return found


def _json(found: Memorisation) -> str:
    """One field per line: the lists are as long as there are images."""
    fields = {**vars(found), "suspicious": found.suspicious, "quantile": QUANTILE}
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items()) + "\n}\n"


def _pairs(samples: Pixels, training: Pixels, rows: Tensor, index: Tensor, distance: Tensor) -> Tensor:
    """A row per sample: itself, then its nearest training images with their distances."""
    cells, labels = [], []
    for i in rows.tolist():
        cells.append(samples.images(i, 1))
        cells += [training.images(int(j), 1) for j in index[i]]
        labels += [
            f"sample {i}",
            *(f"{j}: {d:.3g}" for j, d in zip(index[i].tolist(), distance[i].tolist(), strict=True)),
        ]
    return make_grid(torch.cat(cells), columns=1 + index.shape[1], labels=labels)
