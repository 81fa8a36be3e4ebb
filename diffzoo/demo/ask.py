"""One setting as the page states it, as the call that it is: run it, or write it down as a command or as Python."""

import shlex
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from diffzoo.errors import UserError
from diffzoo.generation import Pipeline, Samples
from diffzoo.generation.seeds import parse_seeds
from diffzoo.sampling import Trajectory
from diffzoo.sizes import sides

__all__ = ["Ask", "Kind", "first_of"]

MOST_IMAGES = 64  # of one setting
MOST_PIXELS = 64 * 512 * 512  # of all images of one setting together
MOST_STEPS = 500

Kind = Literal["__call__", "variations", "interpolate", "edit"]


def first_of(pipe: Pipeline) -> Pipeline:
    """What samples first: of a cascade the model of the small images, which knows the classes."""
    return pipe.base or pipe


@dataclass(frozen=True)
class Ask:
    """What to sample, and how.

    Args:
        source: what `diffzoo.pipeline` takes.
        device: where to compute.
        weights: of a checkpoint: "ema", "raw" or the label of an EMA.
        kind: the method of the pipeline.
        classes: names, numbers or captions; empty for unconditional models.
        seeds: such as "0-7"; one image per class and seed. The two ends of an interpolation.
        steps, guidance, sampler: None = as published.
        around: of variations: the seed that is varied.
        amount: of variations: how far to go towards the other seeds, in [0, 1].
        frames: of an interpolation.
        image, mask: of an edit: files.
        strength: of an edit.
    """

    source: str
    device: str
    weights: str = "ema"
    kind: Kind = "__call__"
    classes: tuple[str | int, ...] = ()
    seeds: str = "0"
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    around: int = 0
    amount: float = 0.3
    frames: int = 8
    image: str | None = None
    mask: str | None = None
    strength: float | None = None

    def count(self) -> int:
        """How many images these are."""
        each = len(parse_seeds(self.seeds))
        return self.frames if self.kind == "interpolate" else max(1, len(self.classes)) * each

    def check(self, pipe: Pipeline) -> None:
        """Refuse what a page that others may open should not start.

        Raises:
            UserError: for too many images or steps, and for what this kind needs and does not have.
        """
        fitting = min(MOST_IMAGES, max(1, MOST_PIXELS // prod(sides(pipe.generator.image_size))))
        if not 1 <= self.count() <= fitting:
            raise UserError(f"you ask for {self.count()} images: this page makes 1 to {fitting} of this size at a time")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"expected 1 to {MOST_STEPS} steps, got {self.steps}")
        kind = first_of(pipe).generator.kind
        if kind in ("class", "caption") and not self.classes:
            raise UserError(f"this model samples from a {kind}: choose one")
        if self.kind == "interpolate" and (len(parse_seeds(self.seeds)) != 2 or len(self.classes) > 1):
            raise UserError("between two seeds: give two seeds, such as 3,7, and one class")
        if self.kind == "variations" and len(self.classes) > 1:
            raise UserError("variations of one seed: choose one class")
        if self.kind == "edit" and self.image is None:
            raise UserError("from an image: upload one first")

    def _options(self, *names: str) -> dict[str, Any]:
        """Those of some fields that are given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Of the method of the pipeline: by position and by name."""
        classes, seeds = list(self.classes) or None, parse_seeds(self.seeds)
        one, how = classes[0] if classes else None, self._options("steps", "guidance", "sampler")
        if self.kind == "variations":
            return [self.around, one], {"seeds": seeds, "amount": self.amount, **how}
        if self.kind == "interpolate":
            return [*seeds, one], {"frames": self.frames, **how}
        first = [self.image] if self.kind == "edit" else []
        return [*first, classes], {"seeds": seeds, **self._options("mask", "strength"), **how}

    def sampled(self, pipe: Pipeline, trajectory: Trajectory | None = None) -> Samples:
        """The images."""
        positional, named = self._arguments()
        made: Samples = getattr(pipe, self.kind)(*positional, **named, trajectory=trajectory)
        return made

    def beside(self) -> "Ask":
        """The same where image and mask lie in the current directory."""
        image, mask = (path and Path(path).name for path in (self.image, self.mask))
        return replace(self, image=image, mask=mask)

    def as_python(self) -> str:
        """Python that makes the same images."""
        positional, named = self._arguments()
        written = [repr(value) for value in positional] + [f"{name}={value!r}" for name, value in named.items()]
        method = "" if self.kind == "__call__" else f".{self.kind}"
        return (
            "import diffzoo\n\n"
            f"pipe = diffzoo.pipeline({self.source!r}, {self.device!r}, weights={self.weights!r})\n"
            f"samples = pipe{method}({', '.join(written)})\n"
            'samples.save_png("samples")\n'
        )

    def as_command(self) -> str:
        """The command that makes the same images."""
        words: list[object] = ["diffzoo", "sample", self.source, "--device", self.device, "--weights", self.weights]
        if self.classes:
            words += ["--classes", *self.classes]
        if self.kind == "interpolate":
            words += ["--between", *parse_seeds(self.seeds), "--frames", self.frames]
        else:
            words += ["--seeds", self.seeds.replace(" ", "")]
        options = self._options("mask", "strength", "steps", "guidance", "sampler")
        if self.kind == "variations":
            options = {"around": self.around, "amount": self.amount, **options}
        if self.kind == "edit":
            options = {"init": self.image, **options}
        for name, value in options.items():
            words += [f"--{name}", value]
        return shlex.join(map(str, [*words, "--dir", "samples"]))
