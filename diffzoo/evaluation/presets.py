"""Protocols by name.

adm-imagenet64 ... 512   the evaluator of arXiv:2105.05233 on 50,000 images: reference file of its authors, with
                         statistics of the training set and 10,000 images (1,000 at 512, where precision and recall
                         are not comparable with those at other sizes)
cifar10, celeba64        FID of 50,000 images against the training set; `diffzoo data stats` makes the reference
coco30k-val2014          30,000 captions of MS-COCO val2014, one image each, at 256 pixels
edm2-fdd                 FID and the Fréchet distance on DINOv2 (arXiv:2406.02507's FD_DINOv2), ImageNet-512
demo                     1,000 images of the demo set, on a random convolutional network: runs anywhere in a minute;
                         its numbers rank models of the demo and mean nothing else
"""

from diffzoo.errors import UserError, did_you_mean
from diffzoo.evaluation.records import EvalProtocol

__all__ = ["PRESETS", "preset"]

_ADM_METRICS = ("fid", "sfid", "is", "precision", "recall")
_ADM_SETTINGS = {"is_split": 5000, "precision_recall_k": 3}
_ADM_FILES = {
    64: "VIRTUAL_imagenet64_labeled",
    128: "VIRTUAL_imagenet128_labeled",
    256: "VIRTUAL_imagenet256_labeled",
    512: "VIRTUAL_imagenet512",
}


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

PRESETS: dict[str, EvalProtocol] = {p.name: p for p in _ALL}


def preset(name: str) -> EvalProtocol:
    """A protocol by name; an unknown one raises and names the nearest."""
    if name not in PRESETS:
        raise UserError(f"unknown protocol {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
