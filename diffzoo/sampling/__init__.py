"""From noise to images: denoisers, guidance, time grids, samplers and the one loop."""

from diffzoo.sampling.denoiser import Denoise, Denoiser
from diffzoo.sampling.grids import Grid, Karras, PowerTime, ShiftedTime, UniformLogSNR, UniformTime
from diffzoo.sampling.guidance import Autoguidance, ClassifierFree, Fade, Interval, PowerCosine
from diffzoo.sampling.loop import Moment, integrate, sample
from diffzoo.sampling.samplers import DDIM, Ancestral, Sampler

__all__ = [
    "DDIM", "Ancestral", "Autoguidance", "ClassifierFree", "Denoise", "Denoiser", "Fade", "Grid", "Interval", "Karras",
    "Moment", "PowerCosine", "PowerTime", "Sampler", "ShiftedTime", "UniformLogSNR", "UniformTime", "integrate",
    "sample",
]  # fmt: skip
