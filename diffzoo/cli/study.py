"""`diffzoo study STUDY.yaml`: arms × seeds trained and evaluated, a table, plots and a verdict for each claim.

`diffzoo study check RUN` lays the loss of a run beside that of earlier runs of its recipe (`diffzoo.study.health`).
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from diffzoo.study.runner import Job

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    study = 'a file, or the name of a study that ships, such as studies/schedule_shift; or "check", with a run'
    parser.add_argument("study", help=study)
    parser.add_argument("checked", nargs="?", type=Path, metavar="RUN", help="with check: the folder of a run")
    curve = "with check: a reference curve, by name or file; default: that of its settings"
    parser.add_argument("--against", metavar="CURVE", help=curve)
    parser.add_argument("--out", type=Path, help="folder of runs and report; default: studies/ and the study's name")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run these arms only")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--devices", help="of each run: as trainer.devices")
    parser.add_argument("--dry-run", action="store_true", help="check every arm, print steps and cost, run nothing")


def run(args: argparse.Namespace) -> int:
    """Check, run, report; the exit status is 1 if a run failed, or if a checked one is out of its band."""
    if args.study == "check":
        return _check(args)
    if args.checked is not None or args.against is not None:
        raise UserError("a run is checked by `diffzoo study check RUN --against CURVE`")
    from diffzoo.recipe.files import find_recipe, recipe_name
    from diffzoo.recipe.study_cost import costs, parsed_arm, shown
    from diffzoo.study.report import write_report
    from diffzoo.study.runner import jobs_of, measured, run_jobs
    from diffzoo.study.spec import read_study

    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, got {args.processes}")
    path = find_recipe(args.study, "study")
    study = read_study(path)
    base = find_recipe(study.base)
    common = {**study.settings, **({} if args.devices is None else {"trainer.devices": args.devices})}
    recipes = {arm: parsed_arm(base, arm, {**common, **settings}) for arm, settings in study.arms.items()}
    found = costs(base, recipes, study.budget)
    for arm in args.only or ():
        if arm not in study.arms:
            raise UserError(f"no arm is called {arm!r}{did_you_mean(arm, study.arms)}")
    out = args.out or Path("studies") / recipe_name(path).rpartition("/")[2]
    settings = {arm: {**common, **study.arms[arm], **cost.settings} for arm, cost in found.items()}
    jobs = jobs_of(study, str(base), {arm: cost.steps for arm, cost in found.items()}, settings, out)
    wanted = [job for job in jobs if not args.only or job.arm in args.only]
    if args.dry_run:
        print(shown(found, len(study.seeds)))
    _check_ready([job for job in wanted if (done := measured(job)) is None or done.failure], recipes)
    if args.dry_run:
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # run_jobs ends its runs
    run_jobs(wanted, args.processes, lambda line: print(line, flush=True))
    print(write_report(study, jobs, out))
    print(f"table, plots and JSON are in {out}")
    return int(any((result := measured(job)) is None or bool(result.failure) for job in wanted))


def _check_ready(jobs: "Sequence[Job]", recipes: Mapping[str, Mapping[str, object]]) -> None:
    """Raise for data, references and feature networks that are not there: once, before anything trains."""
    from diffzoo.cli.eval import check_ready
    from diffzoo.recipe.command import build_data
    from diffzoo.recipe.parse import plain_warnings, section
    from diffzoo.study.runner import eval_arguments

    stated = [section(recipes[arm], "data") for arm in dict.fromkeys(job.arm for job in jobs)]
    with plain_warnings():
        for data in (d for i, d in enumerate(stated) if d and d not in stated[:i]):
            build_data(data).prepare_data()
    if jobs and jobs[0].evaluate is not None:
        try:
            check_ready(eval_arguments(jobs[0], jobs[0].evaluate))
        except UserError as error:
            raise UserError(f"evaluate: {error}") from error


def _check(args: argparse.Namespace) -> int:
    from diffzoo.study.health import check_run, find_curve

    if args.checked is None:
        raise UserError("say which run: diffzoo study check RUN")
    health = check_run(args.checked, None if args.against is None else find_curve(args.against))
    print(health)
    return int(bool(health.out))
