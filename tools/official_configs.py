"""Configs of the official codes as configs of ours: what tests and benchmarks need to compare with them.

Nobody who loads published weights needs this: the registry has their configs.
"""

from collections.abc import Mapping
from typing import Any

from diffzoo.errors import UserError, did_you_mean
from diffzoo.models.adm import DEFAULT_MULTIPLIERS, ADMClassifierConfig, ADMConfig
from diffzoo.models.base import Level
from diffzoo.models.dimr import DiMRConfig, DiMRStage
from diffzoo.models.dit import DiTConfig
from diffzoo.models.pixnerd import PixNerdConfig
from diffzoo.models.uvit_bao import UViTBaoConfig

__all__ = ["adm_config", "dimr_config", "dit_config", "pixnerd_config", "uvit_config"]


def _check_fields(given: Mapping[str, Any], known: set[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{what} has no field {name!r}{did_you_mean(name, known)}")


def _lookup(table: Mapping[str, Any], value: str, field: str) -> Any:
    if value not in table:
        raise UserError(f"unknown {field} {value!r}{did_you_mean(value, table)}")
    return table[value]


# -- DiMR (github.com/qihao067/DiMR)

_NORMS = {"LN": "td_ln", "RMSN": "rmsn", "TDRMSN": "td_rmsn", "ADARMSN": "ada_rmsn"}
_POSITIONS = {"APE": "learned", "Axial_RoPE": "axial_rope"}
_KINDS = {"TransformerBlock": "transformer", "ConvNeXtBlock": "convnext"}
_DIMR_FIELDS = {"channels", "num_classes", "block_grad_to_lowres", "norm_type", "pe_type", "condition_dim",
                 "stage_configs", "name"}  # fmt: skip
_STAGE_FIELDS = {"block_type", "dim", "hidden_dim", "num_attention_heads", "num_blocks", "kernel_size", "max_height",
                 "max_width", "image_input_ratio", "input_feature_ratio", "final_kernel_size",
                 "dropout_prob"}  # fmt: skip


def dimr_config(official: Mapping[str, Any]) -> DiMRConfig:
    """Our config for the official `nnet` dict.

    The official class table counts the null class as its last row (1001 for ImageNet); an even `num_blocks` builds
    one block more.

    Raises:
        UserError: for a field or value that the official network does not have.
    """
    _check_fields(official, _DIMR_FIELDS, "DiMR config")
    rows = int(official.get("num_classes") or 0)
    stages = tuple(_stage(stage) for stage in official["stage_configs"])
    last = stages[-1]
    return DiMRConfig(
        image_size=max(last.grid) * last.ratio,
        in_channels=official["channels"],
        num_classes=max(rows - 1, 0),
        null_class=True,
        stages=stages,
        norm=_lookup(_NORMS, official.get("norm_type", "LN"), "norm_type"),
        positions=_lookup(_POSITIONS, official.get("pe_type", "APE"), "pe_type"),
        detach_features=bool(official.get("block_grad_to_lowres", False)),
        text_width=int(official.get("condition_dim") or 0),
    )


def _stage(official: Mapping[str, Any]) -> DiMRStage:
    _check_fields(official, _STAGE_FIELDS, "DiMR stage")
    return DiMRStage(
        kind=_lookup(_KINDS, official["block_type"], "block_type"),
        grid=(official["max_height"], official["max_width"]),
        width=official["dim"],
        hidden=official["hidden_dim"],
        depth=official["num_blocks"] // 2 * 2 + 1,
        image_ratio=official.get("image_input_ratio", 1),
        patch=official.get("input_feature_ratio", 1),
        heads=official.get("num_attention_heads", 1),
        kernel_size=official.get("kernel_size", 7),
        head_kernel_size=official["final_kernel_size"],
        dropout=float(official.get("dropout_prob", 0)),
    )


# -- U-ViT (github.com/baofff/U-ViT)

_UVIT_FIELDS = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
                "qk_scale", "mlp_time_embed", "num_classes", "clip_dim", "num_clip_token", "conv", "skip",
                "use_checkpoint", "name"}  # fmt: skip


def uvit_config(official: Mapping[str, Any], null_class: bool | None = None) -> UViTBaoConfig:
    """Our config for the official `nnet` dict.

    Args:
        official: the official network's arguments; the defaults of absent ones are the official ones.
        null_class: whether the last row of the official class table stands for "no class". Default: unless the table
            has 1000 rows, as for the ImageNet models without guidance.

    Raises:
        UserError: for a field that the official network does not have.
    """
    _check_fields(official, _UVIT_FIELDS, "U-ViT config")
    rows = max(int(official.get("num_classes", -1)), 0)
    null = rows not in (0, 1000) if null_class is None else null_class
    return UViTBaoConfig(
        image_size=official.get("img_size", 224),
        in_channels=official.get("in_chans", 3),
        num_classes=rows - null if rows else 0,
        null_class=null,
        patch=official.get("patch_size", 16),
        width=official.get("embed_dim", 768),
        depth=official.get("depth", 12) // 2 * 2 + 1,
        heads=official.get("num_heads", 12),
        mlp_ratio=float(official.get("mlp_ratio", 4)),
        qkv_bias=bool(official.get("qkv_bias", False)),
        mlp_time_embed=bool(official.get("mlp_time_embed", False)),
        skip=bool(official.get("skip", True)),
        conv=bool(official.get("conv", True)),
        text_width=int(official.get("clip_dim", 0)),
        text_tokens=int(official.get("num_clip_token", 77)),
    )


# -- ADM (github.com/openai/guided-diffusion)

IMAGENET_CLASSES = 1000


def adm_config(options: Mapping[str, Any]) -> ADMConfig | ADMClassifierConfig:
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


# -- DiT, SiT, REPA, JiT, LightningDiT, RAE


def dit_config(official: Mapping[str, Any], family: str) -> DiTConfig:
    """Our config for an official network's arguments.

    Args:
        official: the arguments; those of DiT-DH give pairs of width, depth and heads.
        family: "DiT", "SiT", "REPA", "JiT", "LightningDiT" or "RAE".
    """
    jit, modern = family == "JiT", official.get("use_rmsnorm", family == "JiT")
    pairs = [official[k] for k in ("hidden_size", "depth", "num_heads")]
    (width, *wide), (depth, *deep), (heads, *more) = [list(p) if isinstance(p, (list, tuple)) else [p] for p in pairs]
    head = {"head_width": wide[0], "head_depth": deep[0], "head_heads": more[0]} if wide else {}
    projector: dict[str, Any] = {}
    if official.get("z_dims"):
        projector = {
            "projector_width": official["z_dims"][0],
            "projector_depth": official["encoder_depth"],
            "projector_hidden": official.get("projector_dim", 2048),
        }
    return DiTConfig(
        image_size=official["input_size"],
        in_channels=official.get("in_channels", 3 if jit else 4),
        num_classes=official.get("num_classes", 1000),
        patch=official.get("patch_size", 1 if family == "LightningDiT" else 2),
        width=width,
        depth=depth,
        heads=heads,
        norm="rms" if modern else "layer",
        mlp="swiglu" if official.get("use_swiglu", jit) else "gelu",
        rope=official.get("use_rope", jit),
        qk_norm=official.get("use_qknorm", official.get("qk_norm", jit)),
        shift=not official.get("wo_shift", False),
        bottleneck=official.get("bottleneck_dim", 0),
        context_tokens=official.get("in_context_len", 0),
        context_start=official.get("in_context_start", 0),
        time_features="gaussian" if family == "RAE" else "sinusoid",
        learned_variance=family == "DiT" and official.get("learn_sigma", True),
        spare_outputs=family == "SiT" and official.get("learn_sigma", True),
        **head,
        **projector,
    )


# -- PixNerd (github.com/MCG-NJU/PixNerd)


def pixnerd_config(official: Mapping[str, Any], image_size: int) -> PixNerdConfig:
    """Our config for the official network's arguments; the number of heads is called `num_groups` there."""
    deep = official["num_cond_blocks"]
    return PixNerdConfig(
        image_size=image_size,
        in_channels=official["in_channels"],
        num_classes=official["num_classes"],
        patch=official["patch_size"],
        width=official["hidden_size"],
        depth=deep,
        heads=official["num_groups"],
        pixel_width=official["hidden_size_x"],
        pixel_depth=official["num_blocks"] - deep,
        pixel_ratio=official["nerf_mlpratio"],
    )
