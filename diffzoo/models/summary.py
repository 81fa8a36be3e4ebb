"""A model in numbers: parameters, multiply-adds and its levels, computed on the meta device.

Nothing is allocated and nothing runs: shapes alone pass through the network. A family without resolution levels may
give the rows of its table by a method `summary_rows()` of its config, a list of dicts with equal keys.
"""

import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffzoo.models.base import Config, LevelConfig, Network
from diffzoo.models.registry import entry, list_models
from diffzoo.sizes import Size, sides, size_text
from diffzoo.typing import Condition, Images, NoiseLevel

__all__ = ["Summary", "describe", "example_inputs", "multiply_adds", "summarise", "zoo_table"]

CAPTION_TOKENS = 77
"""Length of the caption for which multiply-adds of text-to-image networks are counted."""


@dataclass(frozen=True)
class Summary:
    """A model in numbers.

    name, family: the registered name and the network's class.
    parameters: all of them.
    multiply_adds: of one forward pass of one image (half of the floating-point operations), caption of 77 tokens.
    image_size, channels, classes, text_width: what goes in; 0 = no classes, no text.
    note: the registry's remark.
    levels: one row per resolution.
    """

    name: str
    family: str
    parameters: int
    multiply_adds: int
    image_size: Size
    channels: int
    classes: int
    text_width: int = 0
    note: str = ""
    levels: list[dict[str, object]] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The same as JSON-ready data."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """The text as notebooks show it."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        h, w = sides(self.image_size)
        given = f"{self.classes} classes" if self.classes else "no classes"
        given += f", captions of width {self.text_width}" if self.text_width else ""
        lines = [
            f"{self.name}  ({self.family})",
            f"input          {self.channels} x {h} x {w}, {given}",
            f"parameters     {_short(self.parameters)}",
            f"multiply-adds  {_short(self.multiply_adds)} per image and forward pass",
        ]
        lines += [f"note           {self.note}"] if self.note else []
        return "\n".join(lines + (["", *_columns(self.levels)] if self.levels else []))


def _short(number: float) -> str:
    """A count with four significant digits and a unit: 397.6 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


def _columns(rows: list[dict[str, object]]) -> list[str]:
    """Rows of equal keys as aligned text with a headline."""
    cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in cells]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    return str(value)


def _levels(config: Config) -> list[dict[str, object]]:
    if hasattr(config, "summary_rows"):
        return list(config.summary_rows())
    if not isinstance(config, LevelConfig):
        return []
    return [{**asdict(v), "heads": config.heads(v) if v.attention else 0} for v in config.levels]


def example_inputs(
    config: Config, batch: int = 1, device: torch.device | str = "meta"
) -> tuple[Images, NoiseLevel, Condition | None]:
    """Example inputs for a network of this config: z, noise levels and the condition it takes."""
    (h, w), text_width = config.sides, config.text_width
    given: dict[str, torch.Tensor] = {}
    if config.num_classes:
        given["label"] = torch.arange(batch, device=device) % config.num_classes
    if text_width:
        tokens = config.text_tokens or CAPTION_TOKENS
        given["text"] = torch.randn(batch, tokens, text_width, device=device)
    if config.upsampler:
        given["low_res"] = torch.randn(batch, config.in_channels, h // 4, w // 4, device=device)
    z = torch.randn(batch, config.in_channels, h, w, device=device)
    return z, torch.linspace(-1.0, 1.0, batch, device=device), Condition(**given) if given else None


def multiply_adds(network: Network) -> int:
    """Multiply-adds of one forward pass of one image; the network must be on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(*example_inputs(network.config))
    return int(counter.get_total_flops()) // 2


def describe(name: str, **overrides: object) -> Summary:
    """A registered model in numbers, without allocating it.

    Args:
        name: a registered name.
        overrides: rewrites of the config, as for `create_model`.

    Raises:
        UserError: for an unknown name or argument, naming the nearest right one.
    """
    found = entry(name)
    return summarise(name, found.network, found.config.override(**overrides), found.note)


def summarise(name: str, network_class: type[Network], config: Config, note: str = "") -> Summary:
    """A network in numbers, without allocating it.

    Args:
        name: that it is shown by.
        network_class, config: the network.
        note: a remark.
    """
    with torch.device("meta"):
        network = network_class(config)
    return Summary(
        name=name,
        family=network_class.__name__,
        parameters=network.num_parameters(),
        multiply_adds=multiply_adds(network),
        image_size=config.image_size,
        channels=config.in_channels,
        classes=config.num_classes,
        text_width=config.text_width,
        note=note,
        levels=_levels(config),
    )


def zoo_table(pattern: str = "*") -> str:
    """The models that match a shell pattern as a Markdown table, in the order of their names."""
    rows: Iterable[Mapping[str, str]] = [
        {
            "model": f"`{s.name}`",
            "input": f"{s.channels}×{size_text(s.image_size)}" + "²" * isinstance(s.image_size, int),
            "parameters": _short(s.parameters),
            "multiply-adds": _short(s.multiply_adds),
        }
        for s in map(describe, list_models(pattern))
    ]
    lines = ["| model | input | parameters | multiply-adds |", "|---|---|---:|---:|"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])
