"""Frozen companions: autoencoders and text encoders, imported from their own libraries on first use."""

from diffzoo.encoders.autoencoder import Autoencoder, Identity, KLAutoencoder

__all__ = ["Autoencoder", "Identity", "KLAutoencoder"]
