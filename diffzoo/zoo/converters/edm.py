"""EDM's ImageNet-64 network (arXiv:2206.00364): ADM's under other names, with a third layout of the qkv channels.

Their qkv rows are (head, channel, qkv); ours, of the "new" order, (qkv, head, channel). Their class table is a linear
layer on one-hot rows, the transpose of ours, and a row of zeros stands for "no class": our null class, where the config
has one, is a row of zeros. Filters of the resampling layers are constants and are left out.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from diffzoo.errors import UserError
from diffzoo.models.adm import ADMConfig, ADMUNet
from diffzoo.zoo.converters.renaming import on_meta

__all__ = ["from_official", "to_official"]

_TOP = {
    "time.linear1": "map_layer0",
    "time.linear2": "map_layer1",
    "classes": "map_label",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
_RESIDUAL = {
    "norm1": "norm0",
    "conv1": "conv0",
    "embedding": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "out": "proj"}


def _blocks(config: ADMConfig) -> Iterator[tuple[str, str, str]]:
    """Our residual block, the attention behind it, and their block that holds both."""
    sizes = [f"{v.resolution}x{v.resolution}" for v in config.levels]
    for i, level in enumerate(config.levels):
        for j in range(level.depth):
            yield f"down.{i}.blocks.{j}", f"down.{i}.attentions.{j}", f"enc.{sizes[i]}_block{j}"
        for j in range(level.depth + 1):
            yield f"up.{i}.blocks.{j}", f"up.{i}.attentions.{j}", f"dec.{sizes[i]}_block{j}"
        if i:  # a resampling block bears the name of the size it arrives at
            yield f"down.{i - 1}.resample", "", f"enc.{sizes[i]}_down"
            yield f"up.{i}.resample", "", f"dec.{sizes[i - 1]}_up"
    yield "middle.block1", "middle.attention", f"dec.{sizes[-1]}_in0"
    yield "middle.block2", "", f"dec.{sizes[-1]}_in1"


@lru_cache(maxsize=8)
def _names(config: ADMConfig) -> dict[str, str]:
    """Our tensor names to theirs."""
    size = config.levels[0].resolution
    modules = {**_TOP, "conv_in": f"enc.{size}x{size}_conv"}
    for residual, attention, theirs in _blocks(config):
        modules.update({f"{residual}.{a}": f"{theirs}.{b}" for a, b in _RESIDUAL.items()})
        modules.update({f"{attention}.{a}": f"{theirs}.{b}" for a, b in _ATTENTION.items()})
    state = on_meta(lambda: ADMUNet(config)).state_dict()
    parts = [(ours, *ours.rpartition(".")[::2]) for ours in state]
    return {ours: f"model.{modules[module]}.{leaf}" for ours, module, leaf in parts}


def from_official(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """Their state dict as ours.

    Raises:
        UserError: for missing and unknown names.
    """
    names = _names(config)
    given = {k for k in state if not k.endswith(".resample_filter")}
    for what, wrong in (("unknown", given - set(names.values())), ("missing", set(names.values()) - given)):
        if wrong:
            raise UserError(f"these are not the weights of EDM's network of this config: {what} {min(wrong)}")
    return {ours: _to_ours(ours, state[theirs], config) for ours, theirs in names.items()}


def to_official(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, without the constant filters."""
    return {_names(config)[ours]: _to_theirs(ours, tensor, config) for ours, tensor in state.items()}


def _heads(ours: str, config: ADMConfig) -> int:
    side, level = ours.split(".")[:2]
    return config.heads(config.levels[-1 if side == "middle" else int(level)])


def _to_ours(ours: str, tensor: Tensor, config: ADMConfig) -> Tensor:
    if ours == "classes.weight":
        return F.pad(tensor.T, (0, 0, 0, 1 if config.null_class else 0)).contiguous()
    if ".qkv." in ours:
        tensor = rearrange(tensor, "(h d three) ... -> (three h d) ...", three=3, h=_heads(ours, config))
    return tensor[..., 0, 0] if ours.endswith((".qkv.weight", ".out.weight")) else tensor


def _to_theirs(ours: str, tensor: Tensor, config: ADMConfig) -> Tensor:
    if ours == "classes.weight":
        return tensor[: config.num_classes].T.contiguous()
    if ".qkv." in ours:
        tensor = rearrange(tensor, "(three h d) ... -> (h d three) ...", three=3, h=_heads(ours, config))
    return tensor[..., None, None] if ours.endswith((".qkv.weight", ".out.weight")) else tensor
