"""Feature networks behind one protocol: raw pixels in, named feature layers out.

`load_features(name)` builds one. Every network states how it prepares pixels (`rule`) and hashes its weights, so that
a result can carry both. Networks with pretrained weights live in `inception.py`, `backbones.py` and `clip.py`.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffzoo.errors import UserError, did_you_mean, lacks
from diffzoo.precision import float32_digits
from diffzoo.rng import keyed_generator
from diffzoo.tensors import state_sha256

__all__ = ["FEATURE_NETWORKS", "FeatureNetwork", "RandomConv", "extract", "load_features"]


class FeatureNetwork(nn.Module):
    """Raw pixels to features.

    Subclasses set the attributes and implement `layers_of`.

    Attributes:
        name: as in `load_features`.
        dims: size of each layer it gives, for example {"pool": 2048}.
        rule: how pixels are resized and scaled before the network, in words.
        head: parameter prefixes that only the layer "logits" needs; they are hashed apart.
    """

    name: str
    dims: dict[str, int]
    rule: str
    head: tuple[str, ...] = ()

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of float pixels in 0..255 `(b, 3, h, w)`, one `(b, d)` per layer."""
        raise lacks(self, "layers_of")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features, float32 `(b, d)` per layer.

        Args:
            pixels: uint8 `(b, 3, h, w)`, or one channel, which is repeated.

        Raises:
            UserError: for anything else.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise UserError(
                f"feature network {self.name} expects uint8 pixels (b, 3, h, w), got {pixels.dtype} "
                f"{tuple(pixels.shape)}"
            )
        device = next(self.parameters()).device
        x = pixels.to(device, torch.float32).expand(-1, 3, -1, -1)
        with float32_digits(), torch.autocast(device.type, enabled=False):
            return {name: value.float() for name, value in self.layers_of(x).items()}

    def frozen(self) -> "FeatureNetwork":
        """Eval mode, no gradients, channels-last kernels (a third faster on CPUs)."""
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        return self

    def weights_sha256(self) -> str:
        """Hash of the weights behind all layers but "logits"."""
        return state_sha256({k: v for k, v in self.state_dict().items() if not k.startswith(self.head or ("\0",))})

    def head_sha256(self) -> str | None:
        """Hash of the weights that only "logits" needs; None if there are none."""
        head = {k: v for k, v in self.state_dict().items() if self.head and k.startswith(self.head)}
        return state_sha256(head) if head else None


class RandomConv(FeatureNetwork):
    """Three convolutions with random, seeded weights: needs no download and runs anywhere.

    Its distances rank like with like, on one protocol; they are no FID and no measure of how images look to people.
    Used by tests and by the protocol `demo`.
    """

    name = "random-conv"
    rule = "area resize to 32 x 32, (x - 127.5) / 64"
    head = ("fc.",)

    def __init__(self, seed: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.fc = nn.Linear(128, 16)
        self.dims = {"pool": 128, "spatial": 64, "logits": 16}
        generator = keyed_generator("cpu", "random-conv", seed)
        for parameter in self.parameters():
            fan_in = parameter[0].numel()
            scale = (2 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        x = (F.interpolate(pixels, size=(32, 32), mode="area") - 127.5) / 64
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        spatial = F.adaptive_avg_pool2d(x[:, :4], 4).permute(0, 2, 3, 1).flatten(1)
        x = F.relu(self.conv3(x)).flatten(2)
        # the spread over positions tells texture from flat colour, which the mean alone does not
        pool = torch.cat([x.mean(2), x.std(2)], dim=1)
        return {"pool": pool, "spatial": spatial, "logits": self.fc(pool)}


def _lazy(module: str, function: str, **arguments: object) -> Callable[[Path | None], FeatureNetwork]:
    def build(weights: Path | None) -> FeatureNetwork:
        network: FeatureNetwork = getattr(import_module(module), function)(weights, **arguments)
        return network

    return build


def _random_conv(weights: Path | None, seed: int = 0) -> FeatureNetwork:
    if weights is not None:
        raise UserError("random-conv has no weights to load: leave its path out")
    return RandomConv(seed)


BACKBONES = (
    "dinov2-vitl14",
    "convnextv2-base-224",
    "dinov2-vitl14-256",
    "mae-vitl16-224",
    "siglip2-so400m16-224",
    "clip-vitl14-256",
)
FEATURE_NETWORKS: dict[str, Callable[[Path | None], FeatureNetwork]] = {
    "inception-2015": _lazy("diffzoo.metrics.inception", "load_inception"),
    **{name: _lazy("diffzoo.metrics.backbones", "load_backbone", name=name) for name in BACKBONES},
    "clip-vitl14": _lazy("diffzoo.metrics.clip", "load_clip", size=224),
    "clip-vitl14-336": _lazy("diffzoo.metrics.clip", "load_clip", size=336),
    "random-conv": partial(_random_conv, seed=0),
}


def load_features(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A frozen feature network.

    Args:
        name: one of `FEATURE_NETWORKS`.
        weights: path of its weights; None = environment variable, usual place, installed package, in this order.
        device: where it runs.

    Raises:
        UserError: for an unknown name, or when the weights are missing; the message lists three ways to get them.
    """
    if name not in FEATURE_NETWORKS:
        raise UserError(f"unknown feature network {name!r}{did_you_mean(name, FEATURE_NETWORKS)}")
    network = FEATURE_NETWORKS[name](Path(weights) if weights is not None else None)
    return network.frozen().to(device)


def extract(network: FeatureNetwork, pixels: Tensor, batch_size: int = 50) -> dict[str, Tensor]:
    """Features of many images on the CPU, `(n, d)` per layer.

    Args:
        network: from `load_features`.
        pixels: uint8 `(n, 3, h, w)`.
        batch_size: images at once.
    """
    if not len(pixels):
        return {k: torch.empty(0, d) for k, d in network.dims.items()}
    parts = [network(part) for part in pixels.split(batch_size)]
    return {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}
