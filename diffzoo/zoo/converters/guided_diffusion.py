"""ADM's released files (openai/guided-diffusion, MIT): their flags to our configs, their tensors to ours and back.

The files are plain state dicts. The two layouts differ in names, in 1x1 kernels over positions (theirs are `(out, in,
1)` convolutions, ours are linear layers) and in the classifier's table of positions (theirs is channels first). No
value is changed; in particular the layout of the qkv channels stays as it is and is a fact of the config.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.models.adm import (
    CLASSIFIERS,
    DEFAULT_MULTIPLIERS,
    VARIANTS,
    ADMClassifier,
    ADMClassifierConfig,
    ADMConfig,
    ADMEncoderConfig,
    ADMUNet,
)
from diffzoo.models.base import Level

__all__ = ["config_from_official", "from_official", "identify", "to_official"]

IMAGENET_CLASSES = 1000


# -- configs


def config_from_official(options: Mapping[str, Any]) -> ADMConfig | ADMClassifierConfig:
    """Our config for theirs.

    Args:
        options: the arguments of their U-Net's constructor (`model_channels`, attention as downsampling factors;
            `superres` marks the upsampler, whose `in_channels` counts the noisy image alone), or the flags of their
            scripts (`num_channels` or `classifier_width`, attention as pixels in a string; `large_size` marks the
            upsampler).

    Raises:
        UserError: for options that no network of this family has.
    """
    if "classifier_width" in options:
        return _classifier_config(options)
    return _unet_config(options if "model_channels" in options else _constructor_arguments(options))


def _unet_config(options: Mapping[str, Any]) -> ADMConfig:
    channels, outputs = options.get("in_channels", 3), options["out_channels"]
    if outputs not in (channels, 2 * channels):
        raise UserError(f"expected {channels} or {2 * channels} output channels, got {outputs}")
    head_channels = options.get("num_head_channels", -1)
    heads, heads_up = options.get("num_heads", 1), options.get("num_heads_upsample", -1)
    factors = {int(f) for f in options.get("attention_resolutions", options.get("attention_resolutions_ds", ()))}
    levels = _levels(
        options["image_size"],
        [int(m * options["model_channels"]) for m in options.get("channel_mult", (1, 2, 4, 8))],
        options["num_res_blocks"],
        factors,
        heads,
        options.get("dropout", 0.0),
    )
    return ADMConfig(
        image_size=options["image_size"],
        in_channels=channels,
        num_classes=options.get("num_classes") or 0,
        levels=levels,
        base_width=options["model_channels"],
        scale_shift_norm=options.get("use_scale_shift_norm", False),
        residual_resampling=options.get("resblock_updown", False),
        conv_resampling=options.get("conv_resample", True),
        head_channels=None if head_channels == -1 else head_channels,
        attention_order="new" if options.get("use_new_attention_order", False) else "legacy",
        learned_variance=outputs == 2 * channels,
        upsampler=bool(options.get("superres", False)),
        heads_up=heads_up if head_channels == -1 and heads_up not in (-1, heads) else None,
    )


def _levels(
    image_size: int, widths: list[int], depth: int, factors: set[int], heads: int, dropout: float
) -> tuple[Level, ...]:
    return tuple(
        Level(image_size >> i, width, depth, attention=2**i in factors, heads=heads, dropout=dropout)
        for i, width in enumerate(widths)
    )


def _factors(pixels: str, image_size: int) -> set[int]:
    return {image_size // int(p) for p in pixels.split(",")}


def _constructor_arguments(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments that their scripts derive from command-line flags, with the scripts' defaults."""
    upsampler = "large_size" in flags
    size = flags["large_size"] if upsampler else flags.get("image_size", 64)
    given = flags.get("channel_mult")
    multipliers: tuple[float, ...]
    if given:
        multipliers = tuple(int(m) for m in given.split(","))
    elif upsampler and size == 512:  # the upsampler has no half-width level
        multipliers = DEFAULT_MULTIPLIERS[256]
    elif size in DEFAULT_MULTIPLIERS:
        multipliers = DEFAULT_MULTIPLIERS[size]
    else:
        raise UserError(f"no default widths for {size} px, only for {sorted(DEFAULT_MULTIPLIERS)}: give channel_mult")
    kept = ("num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels", "dropout", "resblock_updown")
    return {
        **{"num_res_blocks": 2, "num_heads": 4},
        **{k: flags[k] for k in kept if k in flags},
        "image_size": size,
        "model_channels": flags.get("num_channels", 128),
        "out_channels": 6 if flags.get("learn_sigma", False) else 3,
        "attention_resolutions": _factors(flags.get("attention_resolutions", "16,8"), size),
        "channel_mult": multipliers,
        "num_classes": IMAGENET_CLASSES if flags.get("class_cond", False) else None,
        "use_scale_shift_norm": flags.get("use_scale_shift_norm", True),
        "use_new_attention_order": flags.get("use_new_attention_order", False),
        "superres": upsampler,
    }


def _classifier_config(flags: Mapping[str, Any]) -> ADMClassifierConfig:
    size, width = flags.get("image_size", 64), flags["classifier_width"]
    pool = flags.get("classifier_pool", "attention")
    if pool != "attention":
        raise UserError(f"only classifiers with attention pooling were released, got classifier_pool {pool!r}")
    widths = [int(m * width) for m in DEFAULT_MULTIPLIERS[size]]
    factors = _factors(flags.get("classifier_attention_resolutions", "32,16,8"), size)
    return ADMClassifierConfig(
        image_size=size,
        num_classes=IMAGENET_CLASSES,
        base_width=width,
        scale_shift_norm=flags.get("classifier_use_scale_shift_norm", True),
        residual_resampling=flags.get("classifier_resblock_updown", True),
        levels=_levels(size, widths, flags.get("classifier_depth", 2), factors, heads=1, dropout=0.0),
    )


# -- names

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_TABLES = {"pool.position": "out.2.positional_embedding"}
_POINTWISE = ("qkv", "proj_out", "qkv_proj", "c_proj")  # their convolutions over positions


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESIDUAL.items())


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _ATTENTION.items())


def _down(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 1
    for i, level in enumerate(config.levels):
        for j in range(level.depth):
            yield from _residual(f"down.{i}.blocks.{j}", f"input_blocks.{n}.0")
            yield from _attention(f"down.{i}.attentions.{j}", f"input_blocks.{n}.1")
            n += 1
        yield from _residual(f"down.{i}.resample", f"input_blocks.{n}.0")
        yield f"down.{i}.resample.conv", f"input_blocks.{n}.0.op"
        n += 1


def _up(config: ADMEncoderConfig) -> Iterator[tuple[str, str]]:
    n = 0
    for i, level in reversed(list(enumerate(config.levels))):
        for j in range(level.depth + 1):
            yield from _residual(f"up.{i}.blocks.{j}", f"output_blocks.{n}.0")
            yield from _attention(f"up.{i}.attentions.{j}", f"output_blocks.{n}.1")
            n += 1
        last = f"output_blocks.{n - 1}.{2 if level.attention else 1}"
        yield from _residual(f"up.{i}.resample", last)
        yield f"up.{i}.resample.conv", f"{last}.conv"


def _modules(config: ADMEncoderConfig) -> dict[str, str]:
    """Our module names to theirs, with a few that this config does not have."""
    names = {
        "time.linear1": "time_embed.0",
        "time.linear2": "time_embed.2",
        "classes": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "pool.qkv": "out.2.qkv_proj",
        "pool.out": "out.2.c_proj",
    }
    names.update(_down(config))
    names.update(_residual("middle.block1", "middle_block.0"))
    names.update(_attention("middle.attention", "middle_block.1"))
    names.update(_residual("middle.block2", "middle_block.2"))
    names.update(_up(config))
    return names


@lru_cache(maxsize=32)
def _layout(config: ADMEncoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our tensor names to theirs and the shapes theirs have."""
    if config.norm != ADMEncoderConfig.norm:  # the default
        raise UserError(f"the official networks have group norm alone, got a config with norm {config.norm!r}")
    with torch.device("meta"):
        network = ADMClassifier(config) if isinstance(config, ADMClassifierConfig) else ADMUNet(config)  # type: ignore[arg-type]
    modules = _modules(config)
    layout = {}
    for name, tensor in network.state_dict().items():
        module, _, leaf = name.rpartition(".")
        theirs = _TABLES.get(name) or f"{modules[module]}.{leaf}"
        layout[name] = (theirs, tuple(_to_theirs(theirs, tensor).shape))
    return layout


# -- tensors


def _pointwise(theirs: str) -> bool:
    return theirs.endswith(".weight") and theirs.split(".")[-2] in _POINTWISE


def _to_theirs(theirs: str, tensor: Tensor) -> Tensor:
    if _pointwise(theirs):
        return tensor[..., None]
    return tensor.T.contiguous() if theirs in _TABLES.values() else tensor


def _to_ours(theirs: str, tensor: Tensor) -> Tensor:
    if _pointwise(theirs):
        return tensor[..., 0]
    return tensor.T.contiguous() if theirs in _TABLES.values() else tensor


def from_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """Their state dict as ours.

    Args:
        state: a released file's content.
        config: the network that it is meant for.

    Raises:
        UserError: if the tensors are not those of `config`; the message says whose they are, or what is wrong.
    """
    layout = _layout(config)
    wanted = dict(layout.values())
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if given != wanted:
        raise UserError(_complaint(given, wanted, config))
    return {ours: _to_ours(theirs, state[theirs]) for ours, (theirs, _) in layout.items()}


def to_official(state: Mapping[str, Tensor], config: ADMEncoderConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`: our state dict under their names, loadable by their code."""
    layout = _layout(config)
    missing, extra = layout.keys() - state.keys(), state.keys() - layout.keys()
    if missing or extra:
        raise UserError(f"this state dict does not belong to the config: {_sample(missing, extra)}")
    return {theirs: _to_theirs(theirs, state[ours]) for ours, (theirs, _) in layout.items()}


# -- which member of the family

_CLASS_TABLES = ("label_emb.weight", "out.2.c_proj.weight", "out.2.c_proj.bias")


def identify(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The registered names whose released files have these tensors, whatever the number of classes."""
    wanted = _without_classes(shapes)
    return [
        name
        for name, config in {**VARIANTS, **CLASSIFIERS}.items()
        if _without_classes(dict(_layout(config).values())) == wanted
    ]


def _without_classes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {k: v[1:] if k in _CLASS_TABLES else v for k, v in shapes.items()}


def _names(config: ADMEncoderConfig) -> list[str]:
    return [name for name, known in {**VARIANTS, **CLASSIFIERS}.items() if _layout(known) == _layout(config)]


def _complaint(
    given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], config: ADMEncoderConfig
) -> str:
    expected = " or ".join(_names(config)) or f"a network for {config.image_size} px"
    members = identify(given)
    if members and members == identify(wanted):
        rows = next(given[name][0] for name in _CLASS_TABLES if name in given)
        return f"expected {config.class_rows} rows of classes, got weights of {members[0]} with {rows}"
    if members:
        same = ", which share their shapes" if len(members) > 1 else ""
        return (
            f"expected the weights of {expected}, got those of {' or '.join(members)}{same}: build that network instead"
        )
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    if missing or extra:
        return f"these are not the weights of {expected}, nor of any released ADM model: {_sample(missing, extra)}"
    name = next(k for k in wanted if wanted[k] != given[k])
    return (
        f"these are not the weights of {expected}, nor of any released ADM model: "
        f"{name} has shape {given[name]}, expected {wanted[name]}"
    )


def _sample(missing: set[str], extra: set[str]) -> str:
    parts = [
        f"{len(v)} tensors {word}, such as {min(v)}" for word, v in (("missing", missing), ("unknown", extra)) if v
    ]
    return " and ".join(parts)
