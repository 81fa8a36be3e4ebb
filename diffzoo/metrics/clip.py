"""CLIP ViT-L/14 (arXiv:2103.00020) through transformers: CLIPScore at 224 pixels and CMMD at 336."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.metrics.resize import resize_bicubic
from diffzoo.metrics.weights import carried_by_package, environment_path, existing, missing_weights

__all__ = ["Clip", "load_clip"]

SOURCES = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(FeatureNetwork):
    """Projected image embeddings of a CLIP model, and those of captions.

    Args:
        model: a `transformers.CLIPModel`.
        tokenizer: its tokenizer; None = images only.
        name: as in `load_features`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any, name: str):
        super().__init__()
        self.net, self.tokenizer, self.name = model, tokenizer, name
        self.size = int(model.config.vision_config.image_size)
        self.dims = {"image": int(model.config.projection_dim)}
        self.rule = f"bicubic resize with antialiasing to {self.size} x {self.size}, CLIP mean and standard deviation"
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1) * 255, persistent=False)

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        x = (resize_bicubic(pixels, self.size).clamp(0, 255) - self.mean) / self.std
        pooled = self.net.vision_model(pixel_values=x).pooler_output
        return {"image": self.net.visual_projection(pooled)}

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Projected embeddings of captions `(n, d)` on the CPU; long captions are cut to CLIP's 77 tokens."""
        device = next(self.parameters()).device
        parts = []
        for start in range(0, len(captions), batch_size):
            batch = list(captions[start : start + batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
            pooled = self.net.text_model(**tokens).pooler_output
            parts.append(self.net.text_projection(pooled).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dims["image"])


def load_clip(weights: Path | None = None, size: int = 224) -> Clip:
    """CLIP from a folder in transformers' layout, its environment variable, an installed package, or the Hub."""
    name = "clip-vitl14" if size == 224 else f"clip-vitl14-{size}"
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "eval", f"the feature network {name}") from error
    path = existing(weights, f"--feature-weights {name}") if weights is not None else environment_path(name)
    path = path or carried_by_package(name)
    source = str(path or SOURCES[size])
    try:
        network = Clip(CLIPModel.from_pretrained(source), CLIPTokenizer.from_pretrained(source), name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if path is not None:
            raise UserError(f"{path} holds no CLIP model in transformers' layout: {reason}") from error
        raise missing_weights(
            name,
            f"let transformers download {source} from the Hub (trying it now failed: {reason})",
            "install a package that declares the entry point diffzoo.feature_weights",
        ) from error
    if network.size != size:
        raise UserError(f"{source} is a CLIP model for {network.size} pixels; {name} needs {size}")
    return network
