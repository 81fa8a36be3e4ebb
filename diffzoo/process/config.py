"""Processes as plain data, for `config.json` and `checkpoints.yaml`.

    {"schedule": {"class": "Shifted", "base": "Cosine", "from_resolution": 64, "to_resolution": 256}, "prediction": "V"}

A name alone means the class with its defaults.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from diffzoo.errors import UserError, did_you_mean
from diffzoo.process import gaussian, noise_conditioning, paths, predictions, schedules, weightings

__all__ = ["from_config", "to_config"]

_CLASSES: dict[str, type] = {
    name: getattr(module, name)
    for module in (gaussian, paths, predictions, noise_conditioning, schedules, weightings)
    for name in module.__all__
    if isinstance(getattr(module, name), type) and is_dataclass(getattr(module, name))
}


# names of earlier versions, which old runs and published files hold
_RENAMED = {"reads": "noise_conditioning", "ReadsLogSNR": "LogSNRConditioning", "ReadsTime": "TimeConditioning"}

_KINDS = (schedules.Schedule, paths.Path, predictions.Prediction, noise_conditioning.NoiseConditioning)


def to_config(part: Any) -> Any:
    """A process or one of its parts as JSON-ready data; `from_config` gives back an equal object."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    values = {f.name: to_config(getattr(part, f.name)) for f in fields(part)}
    return {"class": type(part).__name__, **values}


def from_config(data: Any, default: str | None = None) -> Any:
    """Build a process or one of its parts from plain data.

    Args:
        data: a name, or a mapping with the key "class" and the fields; fields that are parts take the same forms.
        default: the class of a mapping that does not name one.

    Raises:
        UserError: for an unknown class or field, naming the nearest right one.
    """
    if is_dataclass(data) and not isinstance(data, type):
        return data
    values = dict(data) if isinstance(data, Mapping) else {"class": data}
    values = {_RENAMED.get(key, key): value for key, value in values.items()}
    name = values.pop("class", default)
    name = _RENAMED.get(str(name), name)
    if not isinstance(name, str) or name not in _CLASSES:
        raise UserError(f"unknown process class {name!r}{did_you_mean(str(name), _CLASSES)}")
    kinds = {f.name: f.type for f in fields(_CLASSES[name])}
    for key in values:
        if key not in kinds:
            raise UserError(f"{name} has no field {key!r}{did_you_mean(key, kinds)}")
    return _CLASSES[name](**{key: _field(key, kinds[key], value) for key, value in values.items()})


def _field(key: str, kind: Any, value: Any) -> Any:
    """One field: built where it is a part of the process, and then of the right kind; else as it is."""
    if kind not in _KINDS:
        return value
    part = from_config(value) if not isinstance(value, str) or value in _CLASSES else None
    if not isinstance(part, kind):
        known = [name for name, cls in _CLASSES.items() if issubclass(cls, kind)]
        raise UserError(f"unknown {key} {value!r}{did_you_mean(str(value), known)}")
    return part
