"""The base of all networks: a config, a forward, and one declaration of its blocks.

A network reads a noise-level number and returns a tensor; it knows nothing of time, schedules or samplers. What the
number and the output mean is a fact of the process (`diffzoo.process.GaussianProcess`).

`Config` is a frozen dataclass per family, which goes to `config.json` unchanged. Registry arguments are rewrites of a
config (`Config.override`); for networks with resolution levels (`Level`) they are stated in pixels.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, cast, get_args, get_type_hints, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from diffzoo.errors import UserError, did_you_mean, lacks
from diffzoo.nn.time_dependent import gate_parameters
from diffzoo.record import from_plain
from diffzoo.sizes import Size, as_size, sides, size_text
from diffzoo.typing import Condition, Images, Labels, NoiseLevel, Output, Tokens

__all__ = ["Config", "Level", "LevelConfig", "Network", "PatchConfig", "Recompute"]

Recompute = bool | Literal["all_but_attention"]
"""Activation checkpointing: off, of whole blocks, or of everything in them but attention."""

# names of arguments in timm, diffusers and the authors' codes, and our names for them
ELSEWHERE = {"in_chans": "in_channels", "drop_rate": "dropout", "drop": "dropout"}
ELSEWHERE |= dict.fromkeys(("img_size", "input_size", "sample_size", "img_resolution"), "image_size")
ELSEWHERE |= dict.fromkeys(("label_dim", "num_class_embeds"), "num_classes")
LEVELLED: dict[str, Any] = {"depth_at": dict | None, "width_at": dict | None, "dropout_from_resolution": int | None}
REWRITES: dict[str, Any] = {"dropout": float | None, **LEVELLED}  # of networks with resolution levels


@runtime_checkable
class _Levelled(Protocol):
    """A level of a network, whatever its family has besides."""

    @property
    def resolution(self) -> int: ...

    @property
    def dropout(self) -> float: ...


L = TypeVar("L", bound=_Levelled)


@dataclass(frozen=True)
class Config:
    """The fields that every family has.

    Args:
        image_size: height and width of the input in pixels (or latent pixels): a number for squares, else (h, w).
        in_channels: channels of the input.
        num_classes: number of real classes; 0 = unconditional.
        null_class: whether the class table has one more row, index `num_classes`, that stands for "no class".
    """

    image_size: Size = 64
    in_channels: int = 3
    num_classes: int = 0
    null_class: bool = True

    # only some families have these, as fields of the same names; without an annotation they are no fields here
    text_width = 0
    """Channels of the caption embeddings that the network reads; 0 = no captions."""
    text_tokens = cast("int | None", None)
    """Tokens of a caption; None = any number."""
    upsampler = False
    """Whether the network enlarges `Condition.low_res`."""
    learned_variance = False
    """Whether the output has twice the channels, the second half for the variance."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_size(self.image_size))
        if self.in_channels < 1 or self.num_classes < 0:
            got = f"in_channels {self.in_channels}, num_classes {self.num_classes}"
            raise UserError(f"expected one channel or more, and no or more classes, got {got}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the input."""
        return sides(self.image_size)

    @property
    def cell(self) -> int:
        """Height and width of any input are multiples of this."""
        return 1

    @property
    def class_rows(self) -> int:
        """Rows of the class table."""
        return self.num_classes + (1 if self.null_class else 0) if self.num_classes else 0

    def override(self, **overrides: object) -> Self:
        """This config with some fields replaced; unknown names raise and name the nearest field.

        Lists and mappings, as recipes have them, become what the field is: levels and stages.
        """
        return replace(self, **_read(self, overrides))


def _read(config: Config, overrides: Mapping[str, object], rewrites: Iterable[str] = ()) -> dict[str, Any]:
    """Overrides with plain lists and mappings decoded.

    Raises:
        UserError: for a name that is neither a field nor a rewrite, with the one that was meant; for a list, a
            mapping or a number that does not fit its field.
    """
    known = {f.name for f in fields(config)} | set(rewrites)
    for name in overrides:
        if name in known:
            continue
        if name in LEVELLED:
            raise UserError(f"{type(config).__name__} has no resolution levels, so {name} does not apply to it")
        meant = ELSEWHERE.get(name)
        hint = f"; here it is called {meant!r}" if meant in known else did_you_mean(name, known)
        raise UserError(f"{type(config).__name__} has no argument {name!r}{hint}")
    hints = get_type_hints(type(config))
    given = {k: _item(v) for k, v in overrides.items()}
    for name in (k for k, v in given.items() if v is None and type(None) not in get_args(hints[k])):
        kept = f"leave it out to keep {getattr(config, name)!r:.60}"
        raise UserError(f"{name} cannot be null: {kept}{_meaning(type(config), name)}")
    read = {k for k, v in given.items() if isinstance(v, list | dict) or hints[k] in (int, float, bool)}
    return {k: from_plain(hints[k], v, k) if k in read else v for k, v in given.items()}


def _meaning(config: type[Config], name: str) -> str:
    """What a docstring says of a field in its first sentence, in brackets; "" if none does."""
    for doc in (cls.__doc__ or "" for cls in config.__mro__):
        if found := re.search(rf"^ +{name}: (.+?)\.\s", doc, re.DOTALL | re.MULTILINE):
            return f" ({' '.join(found[1].split())})"
    return ""


def _item(value: object) -> object:
    """A number of NumPy or torch as one of Python."""
    return value.item() if isinstance(value, np.generic | Tensor) and not value.ndim else value


@dataclass(frozen=True)
class PatchConfig(Config):
    """A config of a transformer on patches.

    Args:
        patch: height and width of a patch in pixels.

    Raises:
        UserError: for an image that the patches do not divide.
    """

    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % self.patch for side in self.sides):
            raise UserError(f"patches of {self.patch} pixels do not divide an image of {size_text(self.image_size)}")

    @property
    def cell(self) -> int:
        return self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.sides[0] // self.patch, self.sides[1] // self.patch


@dataclass(frozen=True)
class Level:
    """One resolution of a network, keyed by pixels.

    Args:
        resolution: height and width of the feature maps in pixels; the shorter of them where they differ.
        width: channels.
        depth: blocks on the way down (the family defines how many go up).
        attention: whether blocks attend over all positions.
        heads: attention heads.
        dropout: probability inside the blocks of this level.
    """

    resolution: int
    width: int
    depth: int
    attention: bool = False
    heads: int = 4
    dropout: float = 0.0


@dataclass(frozen=True)
class LevelConfig(Config):
    """A config with resolution levels, fine to coarse.

    `override` takes, besides the fields,
        dropout: probability, at every level or from `dropout_from_resolution` pixels down to the coarsest;
        dropout_from_resolution: levels of at most this many pixels get the dropout (default: those that have one);
        depth_at, width_at: mappings from resolution in pixels to a new depth or width.

    Another `image_size` (or input transform) scales all resolutions alike: the same network on larger maps.
    `depth_at` and the others refer to the new resolutions.
    """

    levels: tuple[Level, ...] = ()

    @property
    def input_factor(self) -> int:
        """Input pixels per pixel of the first feature map; families with an input transform override it."""
        return 1

    @property
    def trunk_size(self) -> int:
        """Height and width of the first feature map in pixels; the shorter of them where they differ."""
        factor = self.input_factor
        if any(side % factor for side in self.sides):
            text = size_text(self.image_size)
            raise UserError(f"image_size {text} does not divide by {factor}, the factor of the input transform")
        return min(self.sides) // factor

    @property
    def cell(self) -> int:
        return self.input_factor << max(len(self.levels) - 1, 0)

    def grid(self, level: Level) -> tuple[int, int]:
        """Rows and columns of a level's feature maps."""
        shorter = min(self.sides)
        return self.sides[0] * level.resolution // shorter, self.sides[1] * level.resolution // shorter

    def check_levels(self) -> None:
        """Refuse levels that do not begin where the input transform leaves off, each with half the pixels."""
        finest, found = self.trunk_size, [v.resolution for v in self.levels]
        fits = found == [finest >> i for i in range(len(found))]
        if not fits or any(side % self.cell for side in self.sides):
            raise UserError(
                f"levels of {found} px do not fit an image of {size_text(self.image_size)} px: the first level must "
                f"have {finest} px, each other exactly half the pixels of the one before, and the image a multiple of "
                f"{self.cell}"
            )

    def heads(self, level: Level) -> int:
        """Attention heads of a level; families that state channels per head override it."""
        return level.heads

    def override(self, **overrides: object) -> Self:
        rewrites = take_rewrites(overrides)
        read = _read(self, overrides, REWRITES)
        config: Self = replace(self, **{**read, "levels": ()})  # no levels fit any size
        levels = tuple(read.get("levels", ()))
        if "levels" not in overrides:
            levels = _scale(self.levels, config, Fraction(config.trunk_size, self.trunk_size))
        return replace(config, levels=rewritten(levels, rewrites))


def _scale(levels: tuple[Level, ...], config: LevelConfig, ratio: Fraction) -> tuple[Level, ...]:
    """The levels with their resolutions multiplied by `ratio`."""
    scaled = [v.resolution * ratio for v in levels]
    step = config.input_factor * (levels[0].resolution // levels[-1].resolution if levels else 1)
    if any(r.denominator != 1 for r in scaled) or any(side % step for side in config.sides):
        raise UserError(
            f"image_size {size_text(config.image_size)} does not divide down to the coarsest of {len(levels)} levels: "
            f"choose a multiple of {step}"
        )
    return tuple(replace(v, resolution=int(r)) for v, r in zip(levels, scaled, strict=True))


def take_rewrites(overrides: dict[str, object]) -> dict[str, Any]:
    """The rewrites of levels among some overrides, which lose them."""
    return {name: from_plain(hint, _item(overrides.pop(name, None)), name) for name, hint in REWRITES.items()}


def rewritten(levels: tuple[L, ...], rewrites: Mapping[str, Any]) -> tuple[L, ...]:
    """Levels with the rewrites of `LevelConfig.override` applied; by pixels, or by what else they call resolution."""
    levels = _rewrite(levels, "depth", rewrites["depth_at"] or {})
    levels = _rewrite(levels, "width", rewrites["width_at"] or {})
    dropout, start = rewrites["dropout"], rewrites["dropout_from_resolution"]
    return levels if dropout is None and start is None else _place_dropout(levels, dropout, start)


def _rewrite(levels: tuple[L, ...], field: str, at: Mapping[Any, Any]) -> tuple[L, ...]:
    """The levels with `field` replaced at the resolutions that are keys of `at`."""
    resolutions = [v.resolution for v in levels]
    for resolution, value in at.items():
        if not str(resolution).isdigit() or int(resolution) not in resolutions:
            raise UserError(f"{field}_at: no level of {resolution} px; this network has {resolutions}")
        if not str(value).isdigit() or int(value) < 1:
            raise UserError(f"{field}_at: expected a positive whole number at {resolution} px, got {value!r}")
    new = {int(k): int(v) for k, v in at.items()}
    return tuple(replace(v, **{field: new.get(v.resolution, getattr(v, field))}) for v in levels)  # type: ignore[type-var]


def _place_dropout(levels: tuple[L, ...], dropout: float | None, start: int | None) -> tuple[L, ...]:
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"dropout must lie in [0, 1), got {dropout}")
    present = [v.resolution for v in levels if v.dropout > 0]
    if dropout is None and not present:
        raise UserError("dropout_from_resolution needs dropout as well: no level has any")
    p = dropout if dropout is not None else max((v.dropout for v in levels), default=0.0)
    first = start if start is not None else max(present, default=max(v.resolution for v in levels))
    return tuple(replace(v, dropout=p if v.resolution <= first else 0.0) for v in levels)  # type: ignore[type-var]


def _keeping_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of `checkpoint` in which the outputs of attention are saved and nothing else is."""

    def policy(_: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        attention = "scaled_dot_product" in str(operation) and "backward" not in str(operation)
        return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Network(nn.Module):
    """A denoiser network: `(b, c, h, w)` and a noise level to a tensor of the same shape.

    Subclasses set `unit_types`, the block classes that repeat: the units of activation checkpointing, of regional
    compilation and of FSDP, declared once. They run such a block through `self.run(block, ...)`.
    """

    unit_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    any_size: ClassVar[bool] = False
    """Whether one set of weights serves images of every height and width that `Config.cell` divides."""
    config: Config
    metadata: object = None
    """Metadata of the weights it was built with; `diffzoo.zoo.metadata_of` reads it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.grad_checkpointing: Recompute = False

    def forward(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> Float[Tensor, "b ..."]:
        """The network's output at full resolution, `(b, c, h, w)`.

        Args:
            z: noisy input `(b, c, h, w)`.
            noise_level: the number the process lets it read, `(b,)`.
            cond: what to sample; None for unconditional networks.
        """
        raise lacks(self, "forward")

    def training_outputs(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> tuple[Tensor, ...]:
        """All outputs that are trained, coarse to fine; the last is `forward`'s."""
        return (self(z, noise_level, cond),)

    def aligned(self, z: Images, noise_level: NoiseLevel, cond: Condition | None = None) -> tuple[Output, Tokens]:
        """The output, and projected tokens `(b, n, c)` to be aligned with an encoder's, where a family has them."""
        raise UserError(f"{type(self).__name__} has no tokens that could be aligned with an encoder's")

    def log_variance(self, noise_level: NoiseLevel) -> Float[Tensor, "b"]:
        """The logarithm of the expected error at a noise level, `(b,)`, where a family learns it."""
        raise UserError(f"{type(self).__name__} does not learn its uncertainty")

    # -- conditions

    @property
    def conditional(self) -> bool:
        """Whether it takes a condition besides the noise level."""
        return bool(self.config.num_classes or self.config.text_width or self.config.upsampler)

    def labels(self, z: Tensor, cond: Condition | None) -> Labels | None:
        """The class indices of `cond`, checked; None where this network has no classes.

        Raises:
            UserError: for labels without classes, classes without labels, or another batch size.
        """
        label = cond.label if cond is not None else None
        if not self.config.num_classes:
            if label is not None:
                raise UserError("this network is unconditional: it was given class labels; leave them out")
            return None
        if label is None:
            raise UserError(f"this network has {self.config.num_classes} classes: give it class labels")
        if len(label) != len(z):
            raise UserError(f"expected one class label per image, got {len(label)} labels for {len(z)} images")
        return label

    def check_input(self, z: Tensor) -> None:
        """Raise a sentence with expected and given shape if `z` does not fit."""
        c, (h, w), cell = self.config.in_channels, self.config.sides, self.config.cell
        fits = z.ndim == 4 and z.shape[1] == c
        if self.any_size:
            if not fits or z.shape[2] % cell or z.shape[3] % cell or 0 in z.shape[2:]:
                expected = f"(b, {c}, h, w) with h and w multiples of {cell}"
                raise UserError(f"expected an input of shape {expected}, got {tuple(z.shape)}")
        elif not fits or tuple(z.shape[2:]) != (h, w):
            raise UserError(f"expected an input of shape (b, {c}, {h}, {w}), got {tuple(z.shape)}")

    def null_condition(self, cond: Condition | None) -> Condition | None:
        """The condition that stands for "none", of the same batch size: the null class, no text."""
        if cond is None:
            return None
        if cond.label is not None and not self.config.null_class:
            raise UserError("this network has no null class, so it cannot do classifier-free guidance")
        label = torch.full_like(cond.label, self.config.num_classes) if cond.label is not None else None
        text = torch.zeros_like(cond.text) if cond.text is not None else None
        mask = torch.zeros_like(cond.text_mask) if cond.text_mask is not None else None
        if text is not None and mask is None:
            mask = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        return Condition(label=label, text=text, text_mask=mask, low_res=cond.low_res)

    # -- blocks

    def units(self) -> Iterator[nn.Module]:
        """The repeating blocks, in order."""
        return (m for m in self.modules() if isinstance(m, self.unit_types))

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one with FSDP2; the root takes the rest."""
        return list(self.units())

    def lora_targets(self) -> list[str]:
        """Full names of the linear layers that low-rank adapters go to: those inside the blocks."""
        inside = {id(m) for unit in self.units() for m in unit.modules() if isinstance(m, nn.Linear)}
        return [name for name, m in self.named_modules() if id(m) in inside]

    def class_tables(self) -> list[str]:
        """Names of the parameters with one row per class, and perhaps one for the null class last."""
        rows = self.config.class_rows
        tables = [n for n, m in self.named_modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows]
        return [f"{name}.weight" for name in tables]

    def position_tables(self) -> dict[str, tuple[int, int, int]]:
        """Learned position tables `(..., n, c)` by name: (rows of no place, rows and columns of the grid).

        Rows of no place are the first, and the class token is the first of them.
        """
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are exempt from weight decay: the gates of time-dependent norms."""
        return gate_parameters(self)

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute the blocks' activations in the backward pass: less memory, about a quarter more time.

        Args:
            enable: "all_but_attention" keeps the outputs of attention, the dearest to compute again.
        """
        self.grad_checkpointing = enable

    def compile_units(self, **options: Any) -> None:
        """Compile every block in place: one graph per kind of block, and clean state-dict keys.

        Blocks of all widths share one `forward`, and torch gives up on a function after eight graphs, silently going
        on without compilation: the limit is raised to what this network needs. Shapes are taken as fixed unless
        `dynamic` is given, since a block sees the maps of its own level alone.
        """
        units = list(self.units())
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(units))
        for unit in units:
            unit.compile(**{"dynamic": False, **options})

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, through activation checkpointing where it is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            contexts = _keeping_attention if self.grad_checkpointing == "all_but_attention" else noop_context_fn
            return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)
        return block(*args)

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
