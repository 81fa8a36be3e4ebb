"""Frozen companions of networks: autoencoders of latent models, encoders of captions."""

from diffzoo.encoders.autoencoder import Autoencoder, Identity, KLAutoencoder
from diffzoo.encoders.text import CachedText, CLIPEncoder, T5Encoder, TextEncoder

__all__ = ["Autoencoder", "CLIPEncoder", "CachedText", "Identity", "KLAutoencoder", "T5Encoder", "TextEncoder"]
