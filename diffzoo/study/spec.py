"""A study: a base recipe, arms that differ from it in a few settings, seeds, a budget, and what a paper says.

    title: Schedule shift
    source: arXiv:2301.11093, Table 1
    base: emoji/simple_uvit_xs_32
    settings: {data.init_args.image_size: 64}
    arms:
      cosine: {}
      shifted: {model.process.schedule: {class_path: Shifted, init_args: {to_resolution: 128}}}
    seeds: [0, 1, 2]
    budget: {steps: 1500}
    evaluate: {protocol: demo, n: 1000, steps: 30}
    claims:
      - {says: shifting lowers the distance, measure: "frechet:random-conv", lower: shifted, than: cosine}

Settings are those of `diffzoo fit`, by dotted key. Every arm has the same budget: images, optimizer steps, or the FLOPs
that the first arm spends.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffzoo.errors import UserError, did_you_mean
from diffzoo.record import from_plain

__all__ = ["Budget", "Claim", "Evaluate", "Study", "options", "read_study"]


@dataclass(frozen=True)
class Budget:
    """How long each arm trains; exactly one of `steps` and `images` is set.

    Args:
        steps: optimizer steps.
        images: images seen, rounded down to whole batches.
        equal_flops: the first arm trains for the budget, the others for its FLOPs.
    """

    steps: int | None = None
    images: int | None = None
    equal_flops: bool = False

    def __post_init__(self) -> None:
        given = self.images if self.steps is None else self.steps
        if (self.steps is None) == (self.images is None) or given is None or given < 1:
            raise UserError(f"a budget has either steps or images, at least 1: got {self}")

    def steps_of(self, batch_size: int, flops: float, first_flops: float) -> int:
        """Optimizer steps of an arm; `flops` are its FLOPs for one image, `first_flops` those of the first arm."""
        steps = self.steps if self.steps is not None else (self.images or 0) // batch_size
        return max(1, round(steps * first_flops / flops) if self.equal_flops else steps)


@dataclass(frozen=True)
class Evaluate:
    """How finished runs are evaluated: options of `diffzoo eval`.

    Args:
        protocol: name of a protocol.
        n: number of images; None = the protocol's.
        options: further options, for example {steps: 30, guidance: 2.0}.
    """

    protocol: str
    n: int | None = None
    options: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What a paper says of two arms: `measure` of the arm `lower` is lower than that of the arm `than`.

    Args:
        says: the claim in words.
        measure: a column of the table, such as "held-out loss".
        lower, than: labels of two arms.
    """

    says: str
    measure: str
    lower: str
    than: str


@dataclass(frozen=True)
class Study:
    """The file above, read.

    Args:
        title: of the report.
        source: paper and table.
        base: recipe that ships, or a path.
        arms: settings of each arm by its label.
        seeds: of training; every arm trains with each.
        budget: the same for all arms.
        settings: of all arms.
        evaluate: None = the held-out loss alone.
        claims: to be judged.
        note: what a reader should know, for example how this scale differs from the paper's.
    """

    title: str
    source: str
    base: str
    arms: Mapping[str, Mapping[str, object]]
    seeds: tuple[int, ...]
    budget: Budget
    settings: Mapping[str, object] = field(default_factory=dict)
    evaluate: Evaluate | None = None
    claims: tuple[Claim, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise UserError(f"a study compares at least two arms, got {list(self.arms)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"expected different seeds, got {list(self.seeds)}")
        for claim in self.claims:
            for arm in (claim.lower, claim.than):
                if arm not in self.arms:
                    raise UserError(f"claims: no arm is called {arm!r}{did_you_mean(arm, self.arms)}")


def read_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        UserError: for a file that is not YAML, and for any field that does not fit, named by its path.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return from_plain(Study, data, str(path))


def options(settings: Mapping[str, object]) -> list[str]:
    """Settings as options of `diffzoo fit`; mappings and lists are passed as JSON, which YAML contains."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
