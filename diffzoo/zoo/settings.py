"""Settings: the ways in which a set of weights was drawn from in its paper, by name.

    settings:
      guided: {classifier: adm_classifier_128, scale: 0.5}
      ddim25: {sampler: {class: RespacedDDIM, steps: 25}, classifier: adm_classifier_128, scale: 1.25}

A setting replaces the sampler of the weights, says which classifier guides and how strongly, and, for an upsampler,
which model draws the small pictures and in which of its own settings. Rows of published numbers name theirs, so
`diffzoo eval MODEL --setting NAME` draws as the numbers were drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffzoo.errors import UserError, did_you_mean
from diffzoo.zoo.metadata import Metadata, sampler_from

__all__ = ["Setting", "published_scale", "setting_of"]


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    Args:
        sampler: as plain data; None = that of the weights.
        classifier: the weights of a noise-aware classifier that guides; None = none.
        scale: of classifier guidance.
        base: for an upsampler: the model whose pictures it enlarges.
        base_setting: how that model draws; None = plainly.
        labels: rule of the classes in an evaluation, "uniform" or "balanced"; None = balanced.
    """

    sampler: Mapping[str, Any] | None = None
    classifier: str | None = None
    scale: float | None = None
    base: str | None = None
    base_setting: str | None = None
    labels: str | None = None

    @classmethod
    def from_dict(cls, data: Any) -> "Setting":
        """A setting from plain data.

        Raises:
            UserError: for an unknown field or sampler, or fields that do not belong together.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise UserError(f"expected a mapping of {', '.join(known)}, got {data!r}")
        for key in data:
            if key not in known:
                raise UserError(f"a setting has no field {key!r}{did_you_mean(str(key), known)}")
        made = cls(**data)
        if made.sampler is not None:
            sampler_from(dict(made.sampler))
        if (made.classifier is None) != (made.scale is None):
            raise UserError("a classifier and its scale belong together: give both or neither")
        if made.base_setting is not None and made.base is None:
            raise UserError("base_setting says how the base draws: name the base too")
        if made.labels not in (None, "uniform", "balanced"):
            raise UserError(f"expected labels 'uniform' or 'balanced', got {made.labels!r}")
        return made


def setting_of(metadata: Metadata, name: str | None) -> Setting:
    """A setting of some weights by name; without a name the plain one, or an upsampler's first.

    Raises:
        UserError: if there is none of this name, listing those there are.
    """
    if name is not None and name not in metadata.settings:
        known = list(metadata.settings)
        there = f"; there are {', '.join(known)}" if known else ": these weights have none"
        raise UserError(f"no setting is called {name!r}{did_you_mean(name, known) if known else ''}{there}")
    if name is None:
        first = next(iter(metadata.settings), None)
        name = first if metadata.config.get("upsampler") else None
    return Setting() if name is None else Setting.from_dict(metadata.settings[name])


def published_scale(metadata: Metadata, classifier: Metadata | None) -> float | None:
    """The scale that weights were published with under a classifier, in their own sampler; None if there is none."""
    if classifier is None:
        return None
    for data in metadata.settings.values():
        setting = Setting.from_dict(data)
        if (
            setting.classifier is not None
            and setting.classifier.split(".")[0] == classifier.name
            and not setting.sampler
        ):
            return setting.scale
    return None
