"""The frozen encoders beside a network that trains: the autoencoder of latents and the encoder of captions."""

import torch

from diffzoo.encoders.autoencoder import Autoencoder
from diffzoo.encoders.text import TextEncoder
from diffzoo.errors import UserError
from diffzoo.models.base import Network
from diffzoo.typing import Batch, Mask, Tokens

__all__ = ["encoded_text", "prepare"]


def prepare(
    network: Network, autoencoder: Autoencoder | None, text_encoder: TextEncoder | None, device: torch.device
) -> None:
    """Bring the encoders to the device; tell the network what "no text" is, where it has to be told."""
    for encoder in (autoencoder, text_encoder):
        if encoder is not None:
            encoder.to(device)
    tell = getattr(network, "set_null_text", None)
    if tell is not None and text_encoder is not None:
        tell(text_encoder.null(1)[0].to(device))


def encoded_text(batch: Batch, encoder: TextEncoder, device: torch.device) -> tuple[Tokens, Mask]:
    """Encoded captions of a batch and their mask, as cached or encoded now.

    Raises:
        UserError: if the batch has no captions.
    """
    if "text" in batch:
        return batch["text"], batch["text_mask"]
    if "caption" not in batch:
        raise UserError("the recipe has a text encoder but the data has no captions: choose data with captions")
    text, mask = encoder.encode(batch["caption"])
    return text.to(device), mask.to(device)
