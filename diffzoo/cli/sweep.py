"""`diffzoo sweep guidance MODEL --scales 1 1.5 2`: which guidance is best, on common random numbers."""

import argparse
from pathlib import Path
from typing import Any

from diffzoo.cli.eval import (
    default_device,
    default_out,
    open_reference,
    parse_weights,
    plan_arguments,
    shared_arguments,
)
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import write_text

__all__ = ["configure", "run"]

WHAT = ("guidance",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("what", help="what to vary: guidance")
    parser.add_argument("target", nargs=1, metavar="MODEL", help="a published name, a run, a checkpoint")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 1.25, 1.5, 2.0, 3.0], help="guidance scales")
    parser.add_argument(
        "--intervals",
        nargs="+",
        metavar="LOW-HIGH",
        help='in t, such as 0.2-0.8; "all" = everywhere; default: that of the plan',
    )
    parser.add_argument("--averages", nargs="+", default=None, help="labels of weight averages of a run")
    parser.add_argument(
        "--stds", nargs="+", type=float, metavar="WIDTH", help="averaging lengths, reconstructed from a run's snapshots"
    )
    parser.add_argument("--metric", help="to order by; default: the protocol's first")
    parser.add_argument("--first-part", type=float, default=0.2, help="share of images before bad ones are given up")
    parser.add_argument("--margin", type=float, default=0.1, help="relative distance from the best that is given up")
    shared_arguments(parser)
    plan_arguments(parser)


def parse_interval(text: str) -> tuple[float, float] | None:
    """ "0.2-0.8" as a pair; "all" as None."""
    if text == "all":
        return None
    try:
        low, high = (float(part) for part in text.split("-"))
    except ValueError as error:
        raise UserError(f"expected an interval such as 0.2-0.8, or all, got {text!r}") from error
    if not 0 <= low < high <= 1:
        raise UserError(f"an interval lies in t between 0 and 1, low before high; got {text!r}")
    return low, high


def run(args: argparse.Namespace) -> int:
    """Try all, print the table, write plot and plan."""
    if args.what not in WHAT:
        raise UserError(f"diffzoo sweep varies guidance, not {args.what!r}{did_you_mean(args.what, WHAT)}")
    if not args.protocol:
        raise UserError("which protocol? Give --protocol, for example --protocol demo")
    if not 0 < args.first_part <= 1:
        raise UserError(f"--first-part is a share in (0, 1], got {args.first_part}")
    from diffzoo.cli.ema import write_averages
    from diffzoo.cli.eval import open_model, read_protocol
    from diffzoo.evaluation import Settings, sweep
    from diffzoo.evaluation.generate import ModelImages

    device = default_device(args.device)
    args.out = args.out or default_out(args.target[0], "sweep")
    source: Any = open_model(args, device)
    protocol, reference = open_reference(read_protocol(args), args.reference, source.image_size)
    settings = Settings(
        out=args.out, processes=args.processes, device=device, block_size=args.block_size,
        weights=parse_weights(args.weights), few=args.few, groups=0, progress=not args.quiet,
    )  # fmt: skip
    base = source.sample_plan
    intervals = [parse_interval(v) for v in args.intervals] if args.intervals else [sweep.KEEP]
    averages: list[str | None] = list(args.averages or [])
    if args.stds:
        averages += [str(path) for path in write_averages(args.target[0], args.stds)]
    tried = sweep.candidates(args.scales, intervals, averages or [None], none=sweep.no_guidance(base))

    def images(plan: Any) -> ModelImages:
        made = ModelImages(plan, device, source.captions)
        if (plan.model, plan.average) == (base.model, base.average):  # the network is in memory already
            made.__dict__["pipe"] = source.pipe
        return made

    for average in averages:  # a label that does not exist is better known before hours of work
        images(sweep.Candidate(base.guidance["scale"] if base.guidance else 1.0, None, average).plan(base)).plan()
    metric = args.metric or protocol.metrics[0]
    trials = sweep.sweep_guidance(
        images, base, protocol, reference, tried, settings,
        metric=metric, first_part=args.first_part, margin=args.margin,
        report=lambda t: print(f"{t.candidate}: {metric} {t.value:.5g} ({t.n} images)", flush=True),
    )  # fmt: skip
    out = Path(args.out)
    text = sweep.table(trials)
    write_text(out / "sweep.txt", text + "\n")
    chosen = sweep.write_plan(trials[0].plan, out / "plan.json")
    again = f"diffzoo eval {trials[0].plan.model} --plan {chosen} --protocol {args.protocol}"
    again += f" --n {args.n}" if args.n is not None else ""
    print(f"\n{text}\n\nbest: {trials[0].candidate}; plan written back: {again}")
    scale, others = trials[0].candidate.scale, sorted(set(args.scales))
    if len(others) > 1 and scale in (others[0], others[-1]) and scale != sweep.no_guidance(base):
        print(f"note: {scale:g} is the {'largest' if scale == others[-1] else 'smallest'} scale tried: try some beyond")
    print(f"plot: {sweep.plot(trials, metric, out / 'sweep.png')}")
    return 0
