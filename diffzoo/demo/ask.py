"""One setting as the page states it, as the call that it is: run it, or write it down as a command or as Python."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, TypedDict

from diffzoo.errors import UserError
from diffzoo.generation import Pipeline, Samples
from diffzoo.sampling import Trajectory
from diffzoo.sizes import sides

__all__ = ["MOST_IMAGES", "MOST_PIXELS", "MOST_STEPS", "Ask", "Kind", "as_command", "as_python", "sampled"]

MOST_IMAGES = 64  # of one setting
MOST_PIXELS = 64 * 512 * 512  # of all images of one setting together
MOST_STEPS = 500

Kind = Literal["sample", "variations", "interpolation", "edit"]
METHODS: dict[Kind, str] = {
    "sample": "",
    "variations": ".variations",
    "interpolation": ".interpolate",
    "edit": ".edit",
}


class _How(TypedDict, total=False):
    steps: int
    guidance: float
    sampler: str


@dataclass(frozen=True)
class Ask:
    """What to sample, and how.

    Args:
        source: what `diffzoo.pipeline` takes.
        device: where to compute.
        weights: of a checkpoint: "ema", "raw" or the label of an EMA.
        kind: from noise, around one seed, between two, or from an image.
        classes: names, numbers or captions; empty for unconditional models.
        seeds: one image per class and seed; of an interpolation the first two are its ends.
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
    kind: Kind = "sample"
    classes: tuple[str | int, ...] = ()
    seeds: tuple[int, ...] = (0,)
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
        if self.kind == "interpolation":
            return self.frames
        return max(1, len(self.classes)) * len(self.seeds)

    def check(self, pipe: Pipeline) -> None:
        """Refuse what a page that others may open should not start.

        Raises:
            UserError: for too many images or steps, and for what this kind needs and does not have.
        """
        fitting = min(MOST_IMAGES, max(1, MOST_PIXELS // prod(sides(pipe.generator.image_size))))
        if not 1 <= self.count() <= fitting:
            raise UserError(
                f"{self.count()} images are asked for: this page makes 1 to {fitting} of this size at a time"
            )
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"expected 1 to {MOST_STEPS} steps, got {self.steps}")
        if pipe.generator.kind in ("class", "caption") and not self.classes:
            raise UserError(f"this model samples from a {pipe.generator.kind}: choose one")
        if self.kind == "interpolation" and (len(self.seeds) != 2 or len(self.classes) > 1):
            raise UserError("between two seeds: give two seeds, such as 3,7, and one class")
        if self.kind == "variations" and len(self.classes) > 1:
            raise UserError("variations of one seed: choose one class")
        if self.kind == "edit" and self.image is None:
            raise UserError("from an image: upload one first")

    def how(self) -> _How:
        """The options that are not as published."""
        how = _How()
        if self.steps is not None:
            how["steps"] = self.steps
        if self.guidance is not None:
            how["guidance"] = self.guidance
        if self.sampler is not None:
            how["sampler"] = self.sampler
        return how

    def arguments(self) -> tuple[list[object], dict[str, object]]:
        """Of the call of the pipeline: by position and by name."""
        classes, seeds = list(self.classes) or None, list(self.seeds)
        one = classes[0] if classes else None
        how: dict[str, object] = {**self.how()}
        if self.kind == "variations":
            return [self.around, one], {"seeds": seeds, "amount": self.amount, **how}
        if self.kind == "interpolation":
            return [*seeds, one], {"frames": self.frames, **how}
        if self.kind == "edit":
            given = {"strength": self.strength, "mask": self.mask}
            return [self.image, classes], {"seeds": seeds, **{k: v for k, v in given.items() if v is not None}, **how}
        return [classes], {"seeds": seeds, **how}


def sampled(pipe: Pipeline, ask: Ask, trajectory: Trajectory | None = None) -> Samples:
    """The images."""
    positional, named = ask.arguments()
    method = getattr(pipe, METHODS[ask.kind].removeprefix(".") or "__call__")
    made: Samples = method(*positional, **named, trajectory=trajectory)
    return made


def as_python(ask: Ask, pictured: Sequence[str] = ()) -> str:
    """Python that makes the same images.

    Args:
        ask: the setting.
        pictured: names of the uploaded image and mask where they lie at the reader's.
    """
    positional, named = _with_names(ask, pictured).arguments()
    written = [repr(value) for value in positional] + [f"{name}={value!r}" for name, value in named.items()]
    return (
        "import diffzoo\n\n"
        f"pipe = diffzoo.pipeline({ask.source!r}, {ask.device!r}, weights={ask.weights!r})\n"
        f"samples = pipe{METHODS[ask.kind]}({', '.join(written)})\n"
        'samples.save_png("samples")\n'
    )


def as_command(ask: Ask, pictured: Sequence[str] = ()) -> str:
    """The command that makes the same images."""
    ask = _with_names(ask, pictured)
    words = ["diffzoo", "sample", ask.source, "--device", ask.device]
    if ask.weights != "ema":
        words += ["--weights", ask.weights]
    if ask.classes:
        words += ["--classes", *map(str, ask.classes)]
    if ask.kind == "interpolation":
        words += ["--between", *map(str, ask.seeds), "--frames", str(ask.frames)]
    else:
        words += ["--seeds", _ranges(ask.seeds)]
    if ask.kind == "variations":
        words += ["--around", str(ask.around), "--amount", str(ask.amount)]
    if ask.kind == "edit":
        for option, value in (("--init", ask.image), ("--mask", ask.mask), ("--strength", ask.strength)):
            words += [option, str(value)] if value is not None else []
    for option, given in ask.how().items():
        words += [f"--{option}", str(given)]
    return shlex.join([*words, "--dir", "samples"])


def _with_names(ask: Ask, pictured: Sequence[str]) -> Ask:
    from dataclasses import replace

    names = [Path(name).name for name in pictured]
    return replace(ask, image=names[0] if names else ask.image, mask=names[1] if len(names) > 1 else ask.mask)


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as `--seeds` takes them: "0-7,20"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
