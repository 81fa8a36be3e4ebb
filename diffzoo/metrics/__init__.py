"""Measurement: feature networks, and the metrics on their features. See `diffzoo.evaluation` for whole protocols."""

from diffzoo.metrics.clip_score import clip_scores
from diffzoo.metrics.features import FeatureNetwork, extract, load_features
from diffzoo.metrics.frechet import FrechetReference, frechet_distance, frechet_ratio
from diffzoo.metrics.inception_score import inception_score
from diffzoo.metrics.kernels import cmmd, kid, kid_subsets
from diffzoo.metrics.moments import Moments, merge_all
from diffzoo.metrics.neighbours import authentic, density_coverage, nearest, precision_recall
from diffzoo.metrics.vendi import vendi_score

__all__ = [
    "FeatureNetwork",
    "FrechetReference",
    "Moments",
    "authentic",
    "clip_scores",
    "cmmd",
    "density_coverage",
    "extract",
    "frechet_distance",
    "frechet_ratio",
    "inception_score",
    "kid",
    "kid_subsets",
    "load_features",
    "merge_all",
    "nearest",
    "precision_recall",
    "vendi_score",
]
