"""What the arms of a study cost, and how long each trains within the budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffzoo.errors import UserError
from diffzoo.models.summary import multiply_adds
from diffzoo.recipe.parse import parse_recipe, section
from diffzoo.recipe.plan import network_of
from diffzoo.study.spec import Budget, options

__all__ = ["Cost", "costs", "parsed_arm", "shown"]


@dataclass(frozen=True)
class Cost:
    """The cost of one arm: multiply-adds of a forward pass and one image, images in a step, optimizer steps.

    `decays` says whether its learning rate falls over a number of steps that has to follow the budget.
    """

    flops: float
    batch_size: int
    steps: int
    decays: bool

    @property
    def settings(self) -> dict[str, object]:
        """What follows from the number of steps: the learning rate's end, and validation there."""
        decay = {"model.lr_scheduler.init_args.total_steps": self.steps} if self.decays else {}
        validation = {"trainer.val_check_interval": self.steps, "trainer.check_val_every_n_epoch": None}
        return {**decay, **validation, "trainer.max_steps": self.steps}

    @property
    def total(self) -> float:
        """FLOPs of the training: forward, and backward at twice its cost; a multiply-add counts as two."""
        return 3 * 2 * self.flops * self.batch_size * self.steps


def costs(base: Path, parsed: Mapping[str, Mapping[str, object]], budget: Budget) -> dict[str, Cost]:
    """What every arm costs, by its parsed recipe; raises for arms that are the same."""
    seen: dict[str, str] = {}
    found: dict[str, Cost] = {}
    for arm, config in parsed.items():
        twin = seen.setdefault(repr(config), arm)
        if twin != arm:
            raise UserError(f"the arms {twin!r} and {arm!r} differ in nothing: give them different settings")
        flops = float(multiply_adds(network_of(section(config, "model"), str(base))))
        first = found[next(iter(found))].flops if found else flops
        batch_size = int(section(config, "data", "init_args")["batch_size"])
        decays = "total_steps" in section(config, "model", "lr_scheduler", "init_args")
        found[arm] = Cost(flops, batch_size, budget.steps_of(batch_size, flops, first), decays)
    return found


def parsed_arm(base: Path, arm: str, settings: Mapping[str, object]) -> dict[str, object]:
    """The recipe of an arm; raises for settings that a recipe does not have."""
    try:
        return parse_recipe([str(base)], options(settings), None)
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from error


def shown(costs: Mapping[str, Cost], seeds: int) -> str:
    """The arms with their cost as a table."""
    width = max(map(len, costs))
    lines = [f"{'arm':<{width}}  steps  images     multiply-adds  training FLOPs"]
    for arm, cost in costs.items():
        images = cost.steps * cost.batch_size
        lines.append(f"{arm:<{width}}  {cost.steps:<5}  {images:<9}  {cost.flops:13.4g}  {cost.total:.3g}")
    total = seeds * sum(cost.total for cost in costs.values())
    hours = {rate: total / rate / 3600 for rate in (5e10, 2e14)}
    lines.append(f"{len(costs)} arms × {seeds} seeds: {total:.3g} FLOPs")
    lines.append(
        f"about {hours[5e10]:.1f} h on one CPU core at 50 GFLOP/s, {hours[2e14] * 60:.1f} min on a GPU at 200 TFLOP/s; "
        "previews and evaluation come on top"
    )
    return "\n".join(lines)
