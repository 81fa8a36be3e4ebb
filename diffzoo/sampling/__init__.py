"""From noise to images: denoisers, guidance, time grids, samplers and the one loop."""

from diffzoo.sampling.denoiser import Denoise, Denoiser

__all__ = ["Denoise", "Denoiser"]
