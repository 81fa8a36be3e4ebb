"""Sampling with trained weights: one `Generator`, and the pipeline that goes from a name to images."""

from diffzoo.generation.generator import Generator, PlannedImages, device_of
from diffzoo.generation.pipeline import Pipeline, pipeline
from diffzoo.generation.plan import SamplePlan
from diffzoo.generation.samples import Samples

__all__ = ["Generator", "Pipeline", "PlannedImages", "SamplePlan", "Samples", "device_of", "pipeline"]
