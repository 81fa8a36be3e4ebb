"""Processes as plain data, for `config.json` and `checkpoints.yaml`.

    {"schedule": {"class": "Shifted", "base": "Cosine", "from_resolution": 64, "to_resolution": 256}, "prediction": "V"}

A name alone means the class with its defaults.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from diffzoo.errors import UserError, did_you_mean
from diffzoo.process import gaussian, paths, predictions, readings, schedules, weightings

__all__ = ["from_config", "to_config"]

_CLASSES: dict[str, type] = {
    name: getattr(module, name)
    for module in (gaussian, paths, predictions, readings, schedules, weightings)
    for name in module.__all__
    if isinstance(getattr(module, name), type) and is_dataclass(getattr(module, name))
}


def to_config(part: Any) -> Any:
    """A process or one of its parts as JSON-ready data; `from_config` gives back an equal object."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    values = {f.name: to_config(getattr(part, f.name)) for f in fields(part)}
    return {"class": type(part).__name__, **values}


def from_config(data: Any, default: str | None = None) -> Any:
    """Build a process or one of its parts from plain data.

    Args:
        data: a name, a mapping with the key "class", or a plain value, which is returned as it is.
        default: the class of a mapping that does not name one.

    Raises:
        UserError: for an unknown class or field, naming the nearest right one.
    """
    if isinstance(data, str) and data in _CLASSES:
        data = {"class": data}
    if not isinstance(data, dict):
        return data
    values = dict(data)
    name = values.pop("class", default)
    if name not in _CLASSES:
        raise UserError(f"unknown process class {name!r}{did_you_mean(str(name), _CLASSES)}")
    known = {f.name for f in fields(_CLASSES[name])}
    for key in values:
        if key not in known:
            raise UserError(f"{name} has no field {key!r}{did_you_mean(key, known)}")
    built = {}
    for key, value in values.items():
        built[key] = from_config(value)
        if (
            isinstance(value, str)
            and isinstance(built[key], str)
            and key in ("schedule", "path", "prediction", "reads", "base")
        ):
            raise UserError(f"unknown {key} {value!r}{did_you_mean(value, _CLASSES)}")
    return _CLASSES[name](**built)
