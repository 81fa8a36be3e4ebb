"""Frozen encoders: autoencoders of latent models, encoders of captions."""

from diffzoo.encoders.autoencoder import (
    Autoencoder,
    AutoencoderSpec,
    Identity,
    KLAutoencoder,
    LDMAutoencoder,
    RepresentationAutoencoder,
)
from diffzoo.encoders.text import CachedText, CLIPEncoder, MiniLMEncoder, T5Encoder, TextEncoder, TextEncoderSpec

__all__ = [
    "Autoencoder",
    "AutoencoderSpec",
    "CLIPEncoder",
    "CachedText",
    "Identity",
    "KLAutoencoder",
    "LDMAutoencoder",
    "MiniLMEncoder",
    "RepresentationAutoencoder",
    "T5Encoder",
    "TextEncoder",
    "TextEncoderSpec",
]
