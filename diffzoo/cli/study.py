"""`diffzoo study STUDY.yaml`: arms × seeds trained and evaluated, a table, plots and a verdict for each claim.

`diffzoo study check RUN` lays the loss of a run beside that of earlier runs of its recipe (`diffzoo.study.health`).
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffzoo.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from diffzoo.study.spec import Budget

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "study",
        help='a file, or the name of a study that ships, such as studies/schedule_shift; or "check", with a run',
    )
    parser.add_argument("checked", nargs="?", type=Path, metavar="RUN", help="with check: the folder of a run")
    parser.add_argument(
        "--against",
        metavar="CURVE",
        help="with check: a reference curve, by name or file; default: that of its settings",
    )
    parser.add_argument("--out", type=Path, help="folder of runs and report; default: studies/ and the study's name")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms only")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--devices", help="of each run: as trainer.devices")
    parser.add_argument("--dry-run", action="store_true", help="check every arm, print steps and cost, run nothing")


@dataclass(frozen=True)
class _Cost:
    """Of one arm: multiply-adds of a forward pass and one image, images in a step, optimizer steps.

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


def run(args: argparse.Namespace) -> int:
    """Check, run, report; the exit status is 1 if a run failed, or if a checked one is out of its band."""
    if args.study == "check":
        return _check(args)
    if args.checked is not None or args.against is not None:
        raise UserError("a run is checked by `diffzoo study check RUN --against CURVE`")
    from diffzoo.recipe.files import find_recipe, recipe_name
    from diffzoo.study.report import write_report
    from diffzoo.study.runner import jobs_of, measured, run_jobs
    from diffzoo.study.spec import read_study

    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, got {args.processes}")
    path = find_recipe(args.study)
    study = read_study(path)
    base = find_recipe(study.base)
    common = {**study.settings, **({} if args.devices is None else {"trainer.devices": args.devices})}
    costs = _costs(base, {arm: {**common, **settings} for arm, settings in study.arms.items()}, study.budget)
    for arm in args.only or ():
        if arm not in study.arms:
            raise UserError(f"no arm is called {arm!r}{did_you_mean(arm, study.arms)}")
    out = args.out or Path("studies") / recipe_name(path).rpartition("/")[2]
    settings = {arm: {**common, **study.arms[arm], **cost.settings} for arm, cost in costs.items()}
    jobs = jobs_of(study, str(base), {arm: cost.steps for arm, cost in costs.items()}, settings, out)
    if args.dry_run:
        print(_shown(costs, len(study.seeds)))
        return 0
    wanted = [job for job in jobs if not args.only or job.arm in args.only]
    run_jobs(wanted, args.processes, lambda line: print(line, flush=True))
    print(write_report(study, jobs, out))
    print(f"table, plots and JSON are in {out}")
    return int(any((found := measured(job)) is None or bool(found.failure) for job in wanted))


def _check(args: argparse.Namespace) -> int:
    from diffzoo.study.health import check_run, find_curve

    if args.checked is None:
        raise UserError("say which run: diffzoo study check RUN")
    health = check_run(args.checked, None if args.against is None else find_curve(args.against))
    print(health)
    return int(bool(health.out))


def _costs(base: Path, arms: Mapping[str, Mapping[str, object]], budget: "Budget") -> dict[str, _Cost]:
    """What every arm costs; raises for settings that a recipe does not have, and for arms that are the same."""
    parsed = {arm: _parsed(base, arm, settings) for arm, settings in arms.items()}
    seen: dict[str, str] = {}
    costs: dict[str, _Cost] = {}
    for arm, config in parsed.items():
        twin = seen.setdefault(repr(config), arm)
        if twin != arm:
            raise UserError(f"the arms {twin!r} and {arm!r} differ in nothing: give them different settings")
        flops = _multiply_adds(config["model"])
        first = costs[next(iter(costs))].flops if costs else flops
        batch_size = int(config["data"]["init_args"]["batch_size"])
        decays = "total_steps" in ((config["model"].get("lr_scheduler") or {}).get("init_args") or {})
        costs[arm] = _Cost(flops, batch_size, budget.steps_of(batch_size, flops, first), decays)
    return costs


def _parsed(base: Path, arm: str, settings: Mapping[str, object]) -> dict[str, dict]:
    from diffzoo.recipe.parse import parse_recipe
    from diffzoo.study.spec import options

    try:
        config: dict[str, dict] = parse_recipe([str(base)], options(settings), None)
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from error
    return config


def _multiply_adds(model: Mapping[str, object]) -> float:
    from diffzoo.models.summary import describe

    given = cast("Mapping[str, object]", model.get("network_args") or {})
    changes = {k: v for k, v in given.items() if k not in ("classes", "class_names")}
    return float(describe(str(model["network"]), **changes).multiply_adds)


def _shown(costs: Mapping[str, _Cost], seeds: int) -> str:
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
