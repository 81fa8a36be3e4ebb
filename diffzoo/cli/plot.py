"""`diffzoo plot schedule NAME [NAME ...]`: log-SNR, alpha, sigma and weighting of processes, drawn together."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.plot import Curve

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", choices=["schedule"])
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="recipes (also their files, and runs), or published weights"
    )
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), help=".png or .svg (default: schedule.png)")


def run(args: argparse.Namespace) -> int:
    """Draw, and print where."""
    from diffzoo.plot import plot_schedules

    print(f"plot: {plot_schedules({name: _curve(name) for name in args.names}, args.out)}")
    return 0


def _curve(name: str) -> "Curve":
    """The process behind a recipe, a run or published weights, with the weighting that a recipe states."""
    from diffzoo.plot import Curve
    from diffzoo.process import GaussianProcess, UniformEps, Weighting
    from diffzoo.recipe.parse import read_recipe
    from diffzoo.record import from_plain
    from diffzoo.zoo.manifest import find_pretrained, is_pretrained

    if is_pretrained(name):
        process = find_pretrained(name).metadata.process
        if process is None:
            raise UserError(f"{name} states no process")
        return Curve(process)
    content = read_recipe(str(Path(name) / "config.yaml") if Path(name).is_dir() else name)
    model = content.get("model") or {}
    process = from_plain(GaussianProcess, _plain(model.get("process") or {}), "model.process")
    stated = model.get("weighting")
    weighting = UniformEps() if stated is None else from_plain(Weighting, _plain(stated), "model.weighting")  # type: ignore[type-abstract]
    return Curve(process, weighting)


def _plain(part: object) -> object:
    """A class of a recipe, `{class_path, init_args}`, as records have it, `{class, ...}`."""
    if not isinstance(part, dict):
        return part
    given = part.get("init_args") or {} if "class_path" in part else part
    inner = {key: _plain(value) for key, value in given.items()}
    return {"class": part["class_path"], **inner} if "class_path" in part else inner
