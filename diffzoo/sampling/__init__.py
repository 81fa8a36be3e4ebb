"""From noise to images: denoisers, guidance, time grids, samplers and the one loop."""

from diffzoo.sampling.ancestral_solvers import DPMSolverAncestral, DPMSolverSDE
from diffzoo.sampling.classifier import ClassifierGuidance
from diffzoo.sampling.consistency import KarrasStops, MultistepConsistency
from diffzoo.sampling.denoiser import Denoise, Denoiser
from diffzoo.sampling.discrete import Respaced, RespacedAncestral, RespacedDDIM
from diffzoo.sampling.dpm_solver import DPMSolver
from diffzoo.sampling.edm import DPM2, LMS, EDMEuler, Heun
from diffzoo.sampling.euler import Euler, EulerMaruyama
from diffzoo.sampling.flow import FlowHeun
from diffzoo.sampling.grids import (
    Given,
    Grid,
    Karras,
    Polyexponential,
    PowerTime,
    ShiftedTime,
    UniformLogSNR,
    UniformThenZero,
    UniformTime,
)
from diffzoo.sampling.guidance import (
    Autoguidance,
    ClassifierFree,
    DynamicThresholding,
    Guidance,
    GuidanceSchedule,
    Interval,
    PowerCosine,
)
from diffzoo.sampling.loop import Moment, integrate, sample
from diffzoo.sampling.multistep import DEIS, DPMSolverMultistep, UniPC
from diffzoo.sampling.samplers import DDIM, AdjustedDDIM, Ancestral, Sampler
from diffzoo.sampling.trajectory import Trajectory
from diffzoo.sampling.upsample import upsample

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "LMS",
    "AdjustedDDIM",
    "Ancestral",
    "Autoguidance",
    "ClassifierFree",
    "ClassifierGuidance",
    "DPMSolver",
    "DPMSolverAncestral",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "Denoise",
    "Denoiser",
    "DynamicThresholding",
    "EDMEuler",
    "Euler",
    "EulerMaruyama",
    "FlowHeun",
    "Given",
    "Grid",
    "Guidance",
    "GuidanceSchedule",
    "Heun",
    "Interval",
    "Karras",
    "KarrasStops",
    "Moment",
    "MultistepConsistency",
    "Polyexponential",
    "PowerCosine",
    "PowerTime",
    "Respaced",
    "RespacedAncestral",
    "RespacedDDIM",
    "Sampler",
    "ShiftedTime",
    "Trajectory",
    "UniPC",
    "UniformLogSNR",
    "UniformThenZero",
    "UniformTime",
    "integrate",
    "sample",
    "upsample",
]  # fmt: skip
