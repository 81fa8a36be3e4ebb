"""What an evaluation is, as frozen objects with canonical JSON and hashes.

`SamplePlan` says how the images are made and `EvalProtocol` how they are measured. A number is comparable with another
if the protocols' hashes are equal; two runs with equal plans and protocols give equal numbers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self

from diffzoo.errors import UserError, did_you_mean

__all__ = ["EvalProtocol", "ImagesPlan", "NetworkSpec", "Plan", "SamplePlan", "canonical_json", "differences", "digest"]

Rounding = Literal["round", "truncate"]
Resize = Literal["none", "bicubic-antialias"]
LabelRule = Literal["none", "balanced", "uniform", "captions"]


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one meaning.

    Raises:
        UserError: for numbers that are not finite, which JSON does not know.
    """
    plain = asdict(data) if is_dataclass(data) and not isinstance(data, type) else data
    try:
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        name = type(data).__name__ if is_dataclass(data) else "record"
        raise UserError(f"the {name} holds a number that is not finite: give a finite one") from error


def digest(data: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two pieces of JSON-ready data differ: dotted path to the pair of values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*a, *b}):
            found |= differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(v, Mapping) for v in a):
        found = {}
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            found |= differences(x, y, f"{path}[{i}]")
        return found
    return {} if a == b else {path: (a, b)}


class _Record:
    """JSON in and out for the dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        data: dict[str, Any] = json.loads(canonical_json(self))
        return data

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return digest(self)

    @classmethod
    def _checked(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in data:
            if key not in known:
                raise UserError(f"{cls.__name__} has no field {key!r}{did_you_mean(key, known)}")
        return dict(data)


@dataclass(frozen=True)
class SamplePlan(_Record):
    """How images are made. Image i depends on seed `first_seed + i` and on this plan alone, so that 5,000 images are
    the first 5,000 of 50,000.

    Args:
        model: a registered name, a run, a checkpoint: what `diffzoo.zoo.loading.load_any` takes.
        weights_sha256: hash of the network's tensors (`diffzoo.tensors.state_sha256`); filled in on loading.
        sampler: class name and options of the sampler but its steps and grid, for example {"class": "DDIM"}.
        steps: of the sampler.
        grid: class name and options of the time grid.
        guidance: of classifier-free guidance, for example {"scale": 1.5, "formula": "uncond"}, perhaps with "interval"
            {"low": ..., "high": ..., "unit": ...} or "decay"; a list of scales holds one per class of the model. With
            "weak", the name of a weaker model, autoguidance; "weak_average" and "weak_sha256" say which of its
            weights. With "classifier", the name of a noise-aware classifier, and a "scale", its guidance;
            "classifier_sha256" is filled in. None = no guidance.
        first_seed: seed of the first image.
        labels: "balanced" = the classes in turn; "uniform" = drawn for each seed, with replacement, as ADM does;
            "captions" = one caption per image; "none" = unconditional.
        classes: the class indices that labels come from; None = all classes of the model.
        captions_sha256: hash of the captions, one per line.
        precision: of the network: "fp32" with all digits; "tf32" = float32 with the fast products that torch is set to,
            on GPUs usually TF32 in convolutions; "bf16"; or "fp16".
        images_per_batch: images in one call of the network; a device rounds differently for different batches.
        autoencoder: id of the autoencoder that decodes latents, with its revision; filled in on loading.
        average: which weights of a training run: "average", "raw" or the label of an average.
        compile: compile the network's blocks, which rounds differently.
        base: of an upsampler: the plan of the model whose pictures it enlarges, or {model, setting}, which is filled in
            on loading; seeds and classes are the same for both.
    """

    model: str
    weights_sha256: str | None = None
    sampler: dict[str, Any] = field(default_factory=lambda: {"class": "DDIM", "clip": 1.0})
    steps: int = 50
    grid: dict[str, Any] = field(default_factory=lambda: {"class": "UniformTime"})
    guidance: dict[str, Any] | None = None
    first_seed: int = 0
    labels: LabelRule = "balanced"
    classes: tuple[int, ...] | None = None
    captions_sha256: str | None = None
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    images_per_batch: int = 50
    autoencoder: str | None = None
    average: str = "average"
    compile: bool = False
    base: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "tf32", "bf16", "fp16"):
            raise UserError(f"expected precision 'fp32', 'tf32', 'bf16' or 'fp16', got {self.precision!r}")
        if self.labels not in ("none", "balanced", "uniform", "captions"):
            raise UserError(f"expected labels 'none', 'balanced', 'uniform' or 'captions', got {self.labels!r}")
        if self.first_seed < 0:
            raise UserError(f"seeds are not negative, got {self.first_seed}")
        if self.images_per_batch < 1:
            raise UserError(f"images_per_batch must be at least 1, got {self.images_per_batch}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown fields raise."""
        values = cls._checked(data)
        classes = values.get("classes")
        return cls(**{**values, "classes": tuple(classes) if classes is not None else None})


@dataclass(frozen=True)
class ImagesPlan(_Record):
    """Images that exist already.

    Args:
        images: the folder or file they came from.
        images_sha256: hash of the file, or of the names and contents of the folder's files; filled in on reading.
    """

    images: str
    images_sha256: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown fields raise."""
        return cls(**cls._checked(data))


Plan = SamplePlan | ImagesPlan


@dataclass(frozen=True)
class NetworkSpec(_Record):
    """A feature network of a protocol.

    Args:
        name: as in `diffzoo.metrics.load_features`.
        rule: how it prepares pixels; filled in on loading, like the hashes.
        weights_sha256: hash of its weights.
        head_sha256: hash of the classifier's weights, where a metric uses them.
    """

    name: str
    rule: str | None = None
    weights_sha256: str | None = None
    head_sha256: str | None = None


@dataclass(frozen=True)
class EvalProtocol(_Record):
    """How images are measured.

    Args:
        name: of the preset it was made from.
        reference: id of the reference set.
        reference_sha256: hash of the reference file; None = not pinned, filled in on loading.
        n: number of images.
        image_size: height and width of the images in pixels; None = whatever the images have.
        resize: what happens to images of another size: "none" = they are refused; or "bicubic-antialias".
        rounding: from float in [-1, 1] to 0..255: "round" to nearest, or "truncate" as ADM's scripts do.
        networks: the feature networks.
        metrics: names as in `diffzoo.evaluation.measure`.
        settings: parameters of the metrics that change their values.
    """

    name: str
    reference: str
    n: int
    metrics: tuple[str, ...]
    networks: tuple[NetworkSpec, ...] = ()
    reference_sha256: str | None = None
    image_size: int | None = None
    resize: Resize = "none"
    rounding: Rounding = "round"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"a protocol needs at least 1 image, got n = {self.n}")
        if self.rounding not in ("round", "truncate"):
            raise UserError(f"expected rounding 'round' or 'truncate', got {self.rounding!r}")
        if self.resize not in ("none", "bicubic-antialias"):
            raise UserError(f"expected resize 'none' or 'bicubic-antialias', got {self.resize!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown fields raise."""
        values = cls._checked(data)
        networks = tuple(NetworkSpec(**NetworkSpec._checked(v)) for v in values.get("networks", ()))
        return cls(**{**values, "networks": networks, "metrics": tuple(values["metrics"])})

    def with_(self, **changes: Any) -> Self:
        """This protocol with some fields replaced."""
        return replace(self, **changes)
