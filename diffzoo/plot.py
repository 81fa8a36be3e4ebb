"""Plots of noise schedules: log-SNR, the coefficients alpha and sigma, and the weight of noise levels in the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffzoo.errors import UserError
from diffzoo.files import atomic_path
from diffzoo.process import GaussianProcess, Weighting, weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "curves", "plot_schedules"]

POINTS = 400
FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class Curve:
    """A process and how its loss weighs noise levels; None where that is not known."""

    process: GaussianProcess
    weighting: Weighting | None = None


def curves(curve: Curve, points: int = POINTS) -> dict[str, torch.Tensor]:
    """What is drawn of a process, by name, float64 `(points,)`.

    `t` from 0 to 1 without its ends; `logsnr`, `alpha`, `sigma`; and, where the weighting is known, `weight`: that of
    the squared error of eps in a loss over uniform t, divided by its mean.
    """
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    process = curve.process
    alpha, sigma = process.coefficients(t)
    found = {"t": t, "logsnr": process.logsnr(t), "alpha": alpha, "sigma": sigma}
    if curve.weighting is not None:
        weights = weight(process, curve.weighting, t)
        found["weight"] = weights / weights.mean()
    return found


def plot_schedules(named: Mapping[str, Curve], out: Path) -> Path:
    """Draw several processes into one file, .png or .svg.

    Raises:
        UserError: for another ending.
    """
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"plots are written as {' or '.join(FORMATS)}, got the file name {str(out)!r}")
    figure = _drawn({name: curves(curve) for name, curve in named.items()})
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=150)
    return out


def _drawn(drawn: Mapping[str, Mapping[str, torch.Tensor]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    parts = (
        ("logsnr", "log-SNR"),
        ("alpha", "α"),
        ("sigma", "σ"),
        ("weight", "weight of the error of ε, over its mean"),
    )
    for axis, (name, title) in zip(axes.flat, parts, strict=True):
        for label, values in drawn.items():
            if name in values:
                axis.plot(values["t"], values[name], label=label, linewidth=1.4)
        if name in ("sigma", "weight") and any(float(v[name].max()) > 100 for v in drawn.values() if name in v):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("t (0 = data, 1 = noise)", fontsize=8)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    return figure
