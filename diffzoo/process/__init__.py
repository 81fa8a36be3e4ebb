"""The mathematics of noise: schedules, paths, predictions, weightings and the process that owns them."""

from diffzoo.process.gaussian import Estimate, GaussianProcess, expand_like
from diffzoo.process.loss import alignment_loss, denoising_loss, direction_loss, pool_target, uncertainty_loss, weight
from diffzoo.process.noise_conditioning import LogSNRConditioning, NoiseConditioning, TimeConditioning
from diffzoo.process.paths import Path, Straight, VarianceExploding, VariancePreserving
from diffzoo.process.predictions import X0, BoundaryV, Eps, Flow, Prediction, V
from diffzoo.process.schedules import (
    Cosine,
    DiscreteBetas,
    Interpolated,
    LinearBeta,
    LinearLogSNR,
    LinearTime,
    OffsetCosine,
    Schedule,
    Shifted,
)
from diffzoo.process.time_density import CosMap, LogitNormal, LogNormalSigma, TimeDensity
from diffzoo.process.weightings import (
    EDM,
    ELBO,
    EDMWeight,
    MinSNR,
    Sigmoid,
    UniformEps,
    UniformFlow,
    UniformV,
    Weighting,
)

__all__ = [
    "EDM",
    "ELBO",
    "X0",
    "BoundaryV",
    "CosMap",
    "Cosine",
    "DiscreteBetas",
    "EDMWeight",
    "Eps",
    "Estimate",
    "Flow",
    "GaussianProcess",
    "Interpolated",
    "LinearBeta",
    "LinearLogSNR",
    "LinearTime",
    "LogNormalSigma",
    "LogSNRConditioning",
    "LogitNormal",
    "MinSNR",
    "NoiseConditioning",
    "OffsetCosine",
    "Path",
    "Prediction",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "Straight",
    "TimeConditioning",
    "TimeDensity",
    "UniformEps",
    "UniformFlow",
    "UniformV",
    "V",
    "VarianceExploding",
    "VariancePreserving",
    "Weighting",
    "alignment_loss",
    "denoising_loss",
    "direction_loss",
    "expand_like",
    "pool_target",
    "uncertainty_loss",
    "weight",
]  # fmt: skip
