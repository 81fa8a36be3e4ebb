"""Vision backbones of timm as feature networks: DINOv2 for FDD, and the five that FDr^6 has beside Inception.

FDr^k (arXiv:2604.28190) reads these features, as the code of its authors shows:

    convnextv2-base-224     mean of the last map over positions, before the norm of the head
    dinov2-vitl14-256       class token after the last norm; 256 pixels are padded with zeros to 19 x 19 patches
    clip-vitl14-256         class token after the last norm, before the projection; padded likewise
    mae-vitl16-224          class token after the last norm
    siglip2-so400m16-224    attention pooling; weights of 256 pixels at 224

Position tables are resized by timm. The authors compute in bfloat16 by autocast, we in float32.

`dinov2-vitl14` is FD_DINOv2 of arXiv:2306.04675 and arXiv:2406.02507 (FDD): the class token at 224 pixels. The position
table was trained at 518 pixels (37 x 37 patches); the authors of DINOv2 (arXiv:2304.07193) shrink it to 16 x 16 with a
bicubic resize whose scale is (16 + 0.1) / 37 and without antialiasing. timm's own resize differs in both, and changes
the features, so that table is made here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.metrics.resize import resize_bicubic
from diffzoo.metrics.weights import carried_by_package, environment_path, existing, missing_weights

__all__ = ["BACKBONES", "TimmFeatures", "load_backbone", "shrink_positions"]


@dataclass(frozen=True)
class Backbone:
    """A network of timm and the pixels that it sees.

    Args:
        model: name and tag in timm.
        size: images are resized to `size` by `size` pixels.
        paper: name of the network in the literature.
        authors_positions: resize the position table as the authors of DINOv2 do, not as timm does.
    """

    model: str
    size: int
    paper: str
    authors_positions: bool = False


BACKBONES = {
    "dinov2-vitl14": Backbone("vit_large_patch14_dinov2.lvd142m", 224, "DINOv2 ViT-L/14", authors_positions=True),
    "convnextv2-base-224": Backbone("convnextv2_base.fcmae_ft_in22k_in1k", 224, "ConvNeXt V2 B"),
    "dinov2-vitl14-256": Backbone("vit_large_patch14_dinov2.lvd142m", 256, "DINOv2 ViT-L/14"),
    "mae-vitl16-224": Backbone("vit_large_patch16_224.mae", 224, "MAE ViT-L/16"),
    "siglip2-so400m16-224": Backbone("vit_so400m_patch16_siglip_256.v2_webli", 224, "SigLIP 2 So400m/16"),
    "clip-vitl14-256": Backbone("vit_large_patch14_clip_224.openai", 256, "CLIP ViT-L/14"),
}
CLASSIFIERS = ("head.weight", "head.bias", "head.fc.")  # in files of weights; no features need them
STATISTICS = {0.485: "ImageNet mean and standard deviation", 0.5: "mean and standard deviation 0.5"}


@runtime_checkable
class TimmNet(Protocol):
    """The part of the interface of timm's networks that is used here."""

    num_features: int
    pretrained_cfg: dict[str, tuple[float, ...]]

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens `(b, n, d)` or a map `(b, d, h, w)`."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features `(b, d)`."""


class TimmFeatures(FeatureNetwork):
    """The pooled features of a network of timm without a classifier.

    Args:
        net: from `timm.create_model(..., num_classes=0)`.
        name: as in `load_features`.
        size: height and width of its input in pixels.
    """

    mean: Float[Tensor, "1 3 1 1"]
    std: Float[Tensor, "1 3 1 1"]

    def __init__(self, net: TimmNet, name: str, size: int):
        super().__init__()
        mean, std = (torch.tensor(net.pretrained_cfg[key]) for key in ("mean", "std"))
        self.net, self.name, self.size = net, name, size
        self.dims = {"pool": int(net.num_features)}
        statistics = STATISTICS.get(round(float(mean[0]), 3), "CLIP mean and standard deviation")
        self.rule = f"bicubic resize with antialiasing to {size} x {size}, {statistics}"
        self.register_buffer("mean", mean.reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", std.reshape(1, 3, 1, 1) * 255, persistent=False)

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.net.forward_features((resize_bicubic(pixels, self.size) - self.mean) / self.std)
        return {"pool": x.mean((2, 3)) if x.ndim == 4 else self.net.forward_head(x, pre_logits=True)}


def shrink_positions(table: Float[Tensor, "1 n d"], grid: int) -> Float[Tensor, "1 m d"]:
    """Positions of one token and of `grid` by `grid` patches, resized as the authors of DINOv2 do."""
    token, patches = table[:, :1], table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "eval", f"the feature network {name}") from error
    return timm


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _build(name: str, state: dict[str, Tensor] | None, **smaller: int | list[int]) -> TimmFeatures:
    """A network of `BACKBONES`.

    Args:
        name: as in `load_features`.
        state: weights in timm's names or in those of their authors; None = from the Hub.
        smaller: arguments of timm's network that replace its own.
    """
    timm, spec = _timm(name), BACKBONES[name]
    sizes: dict[str, int | bool] = {}
    if spec.authors_positions:
        sizes = {"img_size": 518}
    elif spec.model.startswith("vit"):  # any size: positions are resized, patches over the border are padded
        sizes = {"dynamic_img_size": True, "dynamic_img_pad": True}
    net = timm.create_model(spec.model, pretrained=state is None, num_classes=0, **sizes, **smaller)
    if state is not None:
        named = sys.modules[type(net).__module__].checkpoint_filter_fn(dict(state), net)
        net.load_state_dict({k: v for k, v in named.items() if not k.startswith(CLASSIFIERS)})
    if spec.authors_positions:
        table = net.pos_embed.detach().clone()
        net.set_input_size(img_size=spec.size)
        net.pos_embed = nn.Parameter(shrink_positions(table, net.patch_embed.grid_size[0]))
    return TimmFeatures(net, name, spec.size)


def load_backbone(weights: Path | None, name: str) -> TimmFeatures:
    """A network of `BACKBONES` from a path, its environment variable, an installed package, or the Hub through timm.

    Raises:
        UserError: for weights of another network, or when there are none; the message lists three ways to get them.
    """
    path = existing(weights, f"--feature-weights {name}") if weights is not None else environment_path(name)
    path = path or carried_by_package(name)
    if path is not None:
        try:
            return _build(name, _state(path))
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} holds no weights of {BACKBONES[name].paper}: {reason}") from error
    try:
        return _build(name, None)
    except (OSError, RuntimeError, ValueError) as error:
        raise missing_weights(
            name,
            f"let timm download {BACKBONES[name].model} from the Hub (trying it now failed: "
            f"{str(error).splitlines()[0]})",
            "install a package that declares the entry point diffzoo.feature_weights",
        ) from error
