"""From noise to images: denoisers, guidance, time grids, samplers and the one loop."""

from diffzoo.sampling.classifier import ClassifierGuidance
from diffzoo.sampling.consistency import KarrasStops, MultistepConsistency
from diffzoo.sampling.denoiser import Denoise, Denoiser
from diffzoo.sampling.discrete import Respaced, RespacedAncestral, RespacedDDIM
from diffzoo.sampling.dpm_solver import DPMSolver, DPMSolverMultistep
from diffzoo.sampling.euler import Euler, EulerMaruyama, Heun
from diffzoo.sampling.grids import Grid, Karras, PowerTime, ShiftedTime, UniformLogSNR, UniformThenZero, UniformTime
from diffzoo.sampling.guidance import Autoguidance, ClassifierFree, GuidanceSchedule, Interval, PowerCosine
from diffzoo.sampling.loop import Moment, integrate, sample
from diffzoo.sampling.samplers import DDIM, AdjustedDDIM, Ancestral, Sampler
from diffzoo.sampling.trajectory import Trajectory
from diffzoo.sampling.upsample import upsample

__all__ = [
    "DDIM",
    "AdjustedDDIM",
    "Ancestral",
    "Autoguidance",
    "ClassifierFree",
    "ClassifierGuidance",
    "DPMSolver",
    "DPMSolverMultistep",
    "Denoise",
    "Denoiser",
    "Euler",
    "EulerMaruyama",
    "Grid",
    "GuidanceSchedule",
    "Heun",
    "Interval",
    "Karras",
    "KarrasStops",
    "Moment",
    "MultistepConsistency",
    "PowerCosine",
    "PowerTime",
    "Respaced",
    "RespacedAncestral",
    "RespacedDDIM",
    "Sampler",
    "ShiftedTime",
    "Trajectory",
    "UniformLogSNR",
    "UniformThenZero",
    "UniformTime",
    "integrate",
    "sample",
    "upsample",
]  # fmt: skip
