"""`diffzoo sweep guidance MODEL --scales 1 1.5 2`: which guidance is best, on common random numbers."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.cli.eval_options import (
    default_out,
    open_model,
    plan_arguments,
    read_protocol,
    run_options,
    shared_arguments,
)
from diffzoo.errors import UserError, did_you_mean
from diffzoo.files import write_text
from diffzoo.runs import is_first_process

if TYPE_CHECKING:
    from diffzoo.generation import SamplePlan

__all__ = ["configure", "run"]

WHAT = ("guidance",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("what", help="what to vary: guidance")
    parser.add_argument("target", nargs=1, metavar="MODEL", help="a published name, a run, a checkpoint")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 1.25, 1.5, 2.0, 3.0], help="guidance scales")
    intervals = 'in t, such as 0.2-0.8; "all" = everywhere; default: that of the plan'
    parser.add_argument("--intervals", nargs="+", metavar="LOW-HIGH", help=intervals)
    widths = "widths of EMAs, reconstructed from a run's snapshots"
    parser.add_argument("--stds", nargs="+", type=float, metavar="WIDTH", help=widths)
    parser.add_argument("--metric", help="to order by; default: the protocol's first")
    parser.add_argument(
        "--first-part", type=float, default=0.2, help="images after which bad settings stop, as a share"
    )
    parser.add_argument("--margin", type=float, default=0.1, help="relative distance from the best at which they stop")
    weights = "of a checkpoint, each tried: ema (default), raw, or labels"
    parser.add_argument("--weights", nargs="+", default=[], help=weights)
    shared_arguments(parser)
    plan_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Try all, print the table, write plot and plan."""
    if args.what not in WHAT:
        raise UserError(f"diffzoo sweep varies guidance, not {args.what!r}{did_you_mean(args.what, WHAT)}")
    if not 0 < args.first_part <= 1:
        raise UserError(f"--first-part is a share in (0, 1], got {args.first_part}")
    protocol = read_protocol(args)
    from diffzoo.evaluation import sweep
    from diffzoo.evaluation.demo import open_reference
    from diffzoo.evaluation.model_images import ModelImages
    from diffzoo.generation import device_of
    from diffzoo.generation.guidance import no_guidance
    from diffzoo.training.reconstruction import write_reconstructed

    device = str(device_of(args.device))
    args.out = args.out or default_out(args.target[0], "sweep")
    source = open_model(args, device, args.weights[0] if len(args.weights) == 1 else None)
    protocol, reference = open_reference(protocol, args.reference, source.image_size)
    base = source.sample_plan
    intervals = [sweep.parse_interval(v) for v in args.intervals] if args.intervals else [sweep.KEEP]
    weights: list[str | None] = list(args.weights) if len(args.weights) > 1 else []
    if args.stds:
        weights = [*args.weights, *(str(path) for path in write_reconstructed(args.target[0], args.stds))]
    tried = sweep.candidates(args.scales, intervals, weights or [None], none=no_guidance(base.guidance))

    def images(plan: "SamplePlan") -> ModelImages:
        same = (plan.model, plan.weights) == (base.model, base.weights)  # the network is in memory already
        return ModelImages(plan, device, source.captions, source.loaded if same else None)

    for label in weights:  # a label that does not exist is better known before hours of work
        images(replace(sweep.Candidate(1.0, None, label).plan(base), guidance=base.guidance)).plan()
    metric = args.metric or protocol.metrics[0]
    first = is_first_process()
    trials = sweep.sweep_guidance(
        images, base, protocol, reference, tried, run_options(args, device, groups=0),
        metric=metric, first_part=args.first_part, margin=args.margin,
        report=lambda t: print(f"{t.candidate}: {metric} {t.value:.5g} ({t.n} images)", flush=True) if first else None,
    )  # fmt: skip
    if not first:
        return 0
    out = Path(args.out)
    text = sweep.table(trials)
    write_text(out / "sweep.txt", text + "\n")
    chosen = sweep.write_plan(trials[0].plan, out / "plan.json")
    again = f"diffzoo eval {trials[0].plan.model} --plan {chosen} --protocol {args.protocol}"
    again += f" --n {args.n}" if args.n is not None else ""
    print(f"\n{text}\n\nbest: {trials[0].candidate}; plan written back: {again}")
    scale, others = trials[0].candidate.scale, sorted(set(args.scales))
    if len(others) > 1 and scale in (others[0], others[-1]) and scale != no_guidance(base.guidance):
        print(f"note: {scale:g} is the {'largest' if scale == others[-1] else 'smallest'} scale tried: try some beyond")
    print(f"plot: {sweep.plot(trials, metric, out / 'sweep.png')}")
    return 0
