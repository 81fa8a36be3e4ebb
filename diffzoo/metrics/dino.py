"""DINOv2 ViT-L/14 (arXiv:2304.07193) through timm: the features of FDD (arXiv:2306.04675, arXiv:2406.02507).

The class token after the last norm, 1024 numbers, of images at 224 x 224. The position table was trained at 518 pixels
(37 x 37 patches); the authors shrink it to 16 x 16 with a bicubic resize whose scale is (16 + 0.1) / 37 and without
antialiasing. timm's own resize differs in both, and changes the features, so the table is made here.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.metrics.resize import resize_bicubic
from diffzoo.metrics.weights import carried_by_package, environment_path, existing, missing_weights

__all__ = ["DinoV2", "load_dino", "shrink_positions"]

NAME = "dinov2-vitl14"
MODEL = "vit_large_patch14_dinov2.lvd142m"
SIZE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def shrink_positions(table: Tensor, grid: int) -> Tensor:
    """Position table `(1, 1 + g * g, d)` for `grid` by `grid` patches, as the authors of DINOv2 resize it."""
    token, patches = table[:, :1], table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class DinoV2(FeatureNetwork):
    """The class token of a DINOv2 network.

    Args:
        net: a timm vision transformer without head, whose position table fits `size`.
        size: input size in pixels.
    """

    name = NAME
    rule = "bicubic resize with antialiasing to 224 x 224, ImageNet mean and standard deviation"

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, size: int = SIZE):
        super().__init__()
        self.net, self.size = net, size
        self.dims = {"pool": int(net.num_features)}
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1) * 255, persistent=False)

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        x = (resize_bicubic(pixels, self.size) - self.mean) / self.std
        return {"pool": self.net.forward_head(self.net.forward_features(x), pre_logits=True)}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "eval", f"the feature network {NAME}") from error
    return timm


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _build(state: dict[str, Tensor] | None) -> DinoV2:
    """The network at 224 pixels; `state` in timm's names or in those of the authors, None = from the Hub."""
    timm = _timm()
    net = timm.create_model(MODEL, pretrained=state is None, num_classes=0, img_size=518)
    if state is not None:
        net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), net))
    table = net.pos_embed.detach().clone()
    net.set_input_size(img_size=SIZE)
    net.pos_embed = torch.nn.Parameter(shrink_positions(table, SIZE // PATCH))
    return DinoV2(net)


def load_dino(weights: Path | None = None) -> DinoV2:
    """DINOv2 from a path, its environment variable, an installed package, or the Hub through timm."""
    path = existing(weights, f"--feature-weights {NAME}") if weights is not None else environment_path(NAME)
    path = path or carried_by_package(NAME)
    if path is not None:
        try:
            return _build(_state(path))
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} holds no weights of DINOv2 ViT-L/14: {str(error).splitlines()[0]}") from error
    try:
        return _build(None)
    except (OSError, RuntimeError, ValueError) as error:
        raise missing_weights(
            NAME,
            f"let timm download {MODEL} from the Hub (trying it now failed: {str(error).splitlines()[0]})",
            "install a package that declares the entry point diffzoo.feature_weights",
        ) from error
