"""How images are measured: protocols as frozen objects with a hash, and those that have a name.

A number is comparable with another if the hashes of their protocols are equal.

adm-imagenet64 ... 512   the evaluator of arXiv:2105.05233 on 50,000 images: reference file of its authors, with
                         statistics of the training set and 10,000 images (1,000 at 512, where precision and recall
                         are not comparable with those at other sizes)
cifar10, celeba64        FID of 50,000 images against the training set; `diffzoo data stats` makes the reference
folders                  FID of the images in one folder against those in another, or against any reference
fdr-imagenet256          FDr^6 (arXiv:2604.28190): the mean of the Fréchet distances on Inception, ConvNeXt V2, DINOv2,
                         MAE, SigLIP 2 and CLIP, each divided by the published one of ImageNet's validation set
fdr                      the same on other data, divided by the distances of held-out real images: needs --reference
                         and --held-out
coco30k-val2014          30,000 captions of MS-COCO val2014, one image each, at 256 pixels
edm2-fdd                 FID and the Fréchet distance on DINOv2 (arXiv:2406.02507's FD_DINOv2), ImageNet-512
demo                     1,000 images of the demo set, on a random convolutional network: runs anywhere in a minute;
                         its numbers rank models of the demo and mean nothing else
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from diffzoo.errors import UserError, check_choice, did_you_mean
from diffzoo.generation.plan import Record
from diffzoo.images import Rounding
from diffzoo.sizes import Size

__all__ = ["PROTOCOLS", "EvalProtocol", "NetworkSpec", "protocol"]

Resize = Literal["none", "bicubic-antialias"]


@dataclass(frozen=True)
class NetworkSpec(Record):
    """A feature network of a protocol.

    Args:
        name: as in `diffzoo.metrics.load_features`.
        rule: how it prepares pixels; filled in on loading, like the hashes.
        weights_sha256: hash of its weights.
        head_sha256: hash of the classifier's weights, where a metric uses them.
    """

    name: str
    rule: str | None = None
    weights_sha256: str | None = None
    head_sha256: str | None = None


@dataclass(frozen=True)
class EvalProtocol(Record):
    """How images are measured.

    Args:
        name: of the named protocol it was made from.
        reference: id of the reference set.
        reference_sha256: hash of the reference file; None = not pinned, filled in on loading.
        n: number of images.
        image_size: height and width of the images in pixels; None = whatever the images have.
        resize: what happens to images of another size: "none" = they are refused; or "bicubic-antialias".
        rounding: from float in [-1, 1] to 0..255: "round" to nearest, or "truncate" as ADM's scripts do.
        networks: the feature networks.
        metrics: names as in `diffzoo.evaluation.measure`.
        settings: parameters of the metrics that change their values.
    """

    name: str
    reference: str
    n: int
    metrics: tuple[str, ...]
    networks: tuple[NetworkSpec, ...] = ()
    reference_sha256: str | None = None
    image_size: Size | None = None
    resize: Resize = "none"
    rounding: Rounding = "round"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"a protocol needs at least 1 image, got n = {self.n}")
        for name, kind in (("rounding", Rounding), ("resize", Resize)):
            check_choice(f"protocol.{name}", getattr(self, name), kind)


_ADM_METRICS = ("fid", "sfid", "is", "precision", "recall")
_ADM_SETTINGS = {"is_split": 5000, "precision_recall_k": 3}
_ADM_FILES = {
    64: "VIRTUAL_imagenet64_labeled",
    128: "VIRTUAL_imagenet128_labeled",
    256: "VIRTUAL_imagenet256_labeled",
    512: "VIRTUAL_imagenet512",
}


# of ImageNet's validation set to its training set, centre crops of 256 pixels, as the authors of arXiv:2604.28190 print
# them and divide by them: MAE's has one digit, so FDr^6 with more exact ones differs by several per cent
FDR_IMAGENET = {
    "inception-2015": 1.68,
    "convnextv2-base-224": 56.87,
    "dinov2-vitl14-256": 14.19,
    "mae-vitl16-224": 0.04,
    "siglip2-so400m16-224": 0.60,
    "clip-vitl14-256": 5.60,
}
_FDR_METRICS = tuple(f"frechet-ratio:{name}" for name in FDR_IMAGENET)


def _adm(size: int) -> EvalProtocol:
    return EvalProtocol(
        name=f"adm-imagenet{size}",
        reference=_ADM_FILES[size],
        n=50_000,
        metrics=_ADM_METRICS,
        image_size=size,
        rounding="truncate",
        settings=_ADM_SETTINGS,
    )


_ALL = (
    *(_adm(size) for size in _ADM_FILES),
    EvalProtocol(name="folders", reference="folder", n=50_000, metrics=("fid",)),
    EvalProtocol(name="fdr", reference="train", n=50_000, metrics=_FDR_METRICS),
    EvalProtocol(
        name="fdr-imagenet256",
        reference="paper_ref_stats",
        n=50_000,
        metrics=_FDR_METRICS,
        image_size=256,
        settings={"held_out_distance": FDR_IMAGENET},
    ),
    EvalProtocol(name="cifar10", reference="cifar10-train", n=50_000, metrics=("fid",), image_size=32),
    EvalProtocol(name="celeba64", reference="celeba64-train", n=50_000, metrics=("fid",), image_size=64),
    EvalProtocol(
        name="coco30k-val2014",
        reference="coco-val2014-256",
        n=30_000,
        metrics=("fid", "clip_score", "cmmd"),
        image_size=256,
    ),
    EvalProtocol(
        name="edm2-fdd",
        reference="imagenet512-train",
        n=50_000,
        metrics=("fid", "fdd", "precision_dinov2", "recall_dinov2"),
        image_size=512,
        settings={"precision_recall_k": 3},
    ),
    EvalProtocol(
        name="demo",
        reference="diffzoo-demo",
        n=1000,
        metrics=tuple(
            f"{kind}:random-conv" for kind in ("frechet", "kid", "precision", "recall", "density", "coverage")
        ),
        settings={"precision_recall_k": 3, "density_coverage_k": 5, "kid_subsets": 50, "kid_subset_size": 500},
    ),
)

PROTOCOLS: dict[str, EvalProtocol] = {p.name: p for p in _ALL}


def protocol(name: str) -> EvalProtocol:
    """A protocol by name; an unknown one raises and names the nearest."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]
