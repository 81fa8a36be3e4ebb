"""The noise process that a recipe, a run or published weights state, read without a parser."""

from pathlib import Path

from diffzoo.errors import UserError
from diffzoo.process import GaussianProcess, UniformEps, Weighting
from diffzoo.recipe.parse import read_recipe, section
from diffzoo.record import from_plain
from diffzoo.zoo.manifest import find_pretrained, is_pretrained

__all__ = ["stated_process"]


def stated_process(name: str) -> tuple[GaussianProcess, Weighting | None]:
    """The process of a recipe, its file, the directory of a run or published weights, and the weighting it states.

    Raises:
        UserError: if there is none, or it states no process that can be read.
    """
    if is_pretrained(name):
        known = find_pretrained(name).metadata.process
        if known is None:
            raise UserError(f"{name} states no process")
        return known, None
    content = read_recipe(str(Path(name) / "config.yaml") if Path(name).is_dir() else name)
    model = section(content, "model")
    process = from_plain(GaussianProcess, _plain(model.get("process") or {}), "model.process")
    stated = model.get("weighting")
    if stated is None:
        return process, UniformEps()
    return process, from_plain(Weighting, _plain(stated), "model.weighting")  # type: ignore[type-abstract]


def _plain(part: object) -> object:
    """A class of a recipe, `{class_path, init_args}`, as records have it, `{class, ...}`."""
    if not isinstance(part, dict):
        return part
    given = part.get("init_args") or {} if "class_path" in part else part
    inner = {key: _plain(value) for key, value in given.items()}
    return {"class": part["class_path"], **inner} if "class_path" in part else inner
