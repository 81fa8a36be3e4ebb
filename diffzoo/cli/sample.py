"""`diffzoo sample SOURCE`: sample images from a run, a checkpoint or a published model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffzoo.cli.eval_options import sampling_arguments
from diffzoo.errors import UserError
from diffzoo.sizes import as_size

if TYPE_CHECKING:
    from diffzoo.generation import Pipeline, Samples
    from diffzoo.generation.published import Options, Speed
    from diffzoo.sampling import Trajectory

__all__ = ["configure", "run"]

SHIPPED = "simple_uvit_xs_32.emoji"
DEFAULT_CLASSES = 8
FRAMES, SHEET = 50, 8  # steps that an animation and a sheet show, about


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    source = f"a published name, a run, a file, or hf-hub:owner/name; default: {SHIPPED}, which ships with the package"
    parser.add_argument("source", nargs="?", default=SHIPPED, help=source)
    classes = "names or numbers of classes, or captions for a text model; default: some of the classes"
    parser.add_argument("--classes", "--captions", nargs="+", metavar="CLASS", help=classes)
    parser.add_argument("--seeds", default="0-7", help='such as "0-7" or "0-15,20", for every class (default: 0-7)')
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, 96x64 or 64; default: the model's")
    parser.add_argument("--steps", type=int, help="of the sampler; default: the published number, else 50")
    parser.add_argument("--guidance", type=float, help="strength, in the formula that belongs to the weights")
    parser.add_argument(
        "--guidance-decay", type=float, metavar="POWER", help="DiMR's power cosine: (1 - cos(pi (1 - t)^POWER)) / 2"
    )
    interval = ("LOW", "HIGH")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=interval, help="guide for t between these")
    parser.add_argument("--guidance-rescale", type=float, metavar="PHI", help="against too bright images: 0 to 1")
    parser.add_argument("--guidance-threshold", type=float, metavar="Q", help="dynamic thresholding: quantile, 0.995")
    parser.add_argument("--classifier", help="a noise-aware classifier that does the guidance: adm_classifier_256")
    parser.add_argument("--preset", help="a published way to sample: guided, ddim25, ...; see `diffzoo describe`")
    parser.add_argument("--upsample", metavar="SOURCE", help="enlarge the images with this model: adm_64_to_256")
    parser.add_argument("--upsample-steps", type=int, metavar="N", help="of that model; default: the published number")
    parser.add_argument("--init", metavar="IMAGE", help="begin with this image, noised, instead of noise")
    parser.add_argument(
        "--strength",
        type=float,
        help="share of the steps that change it: small keeps it (default: 0.6; with --mask: 1)",
    )
    parser.add_argument("--mask", metavar="IMAGE", help="of --init: sample only where this is white")
    parser.add_argument("--between", type=int, nargs=2, metavar="SEED", help="images on the way between two seeds")
    parser.add_argument("--frames", type=int, default=8, help="of --between (default: 8)")
    parser.add_argument("--around", type=int, metavar="SEED", help="variations of this seed, towards each of --seeds")
    parser.add_argument("--amount", type=float, default=0.3, help="of --around: 0 = none, 1 = another image")
    parser.add_argument("--sampler", help="name of a sampler, such as DDIM or DPMSolver; default: the published one")
    parser.add_argument("--weights", default="ema", help="of a checkpoint: ema (default), raw, or the label of an EMA")
    grid = "the grid, a row per class: .png, .webp or .jpg (default: samples.png)"
    parser.add_argument("--out", default="samples.png", help=grid)
    parser.add_argument("--dir", help="write each image into this new folder too, with its record in the metadata")
    parser.add_argument("--npz", metavar="FILE", help="write all images as the ADM evaluator reads them, with classes")
    steps = "x_hat on the way: an animation (.gif) or a sheet with a row per image (.png)"
    parser.add_argument("--trajectory", metavar="FILE", help=steps)
    sampling_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="compile the network: worth it for many images")


def _guidance(args: argparse.Namespace) -> "float | dict[str, object] | None":
    """The guidance asked for: a strength, or with it when it acts."""
    decay, interval = args.guidance_decay, args.guidance_interval
    asked = {
        "scale": args.guidance,
        "decay": None if decay is None else {"power": decay},
        "interval": None if interval is None else dict(zip(("low", "high"), interval, strict=True)),
        "rescale": args.guidance_rescale,
        "threshold": args.guidance_threshold,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    return args.guidance if options.keys() <= {"scale"} else options


def _trajectory(args: argparse.Namespace, steps: int) -> "Trajectory | None":
    """What collects the steps, about FRAMES or SHEET of them; None if nobody asked."""
    if args.trajectory is None:
        return None
    name = args.trajectory.lower()
    if not name.endswith((".gif", ".png")):
        raise UserError(f"--trajectory writes a .gif or a .png, got {args.trajectory!r}")
    from diffzoo.sampling import Trajectory

    return Trajectory(every=max(1, steps // (FRAMES if name.endswith(".gif") else SHEET)))


def _save_trajectory(found: "Trajectory", path: str, samples: "Samples") -> None:
    from diffzoo.images import save_image

    if path.lower().endswith(".gif"):
        found.save_gif(path, samples.columns, labels=samples.titles)
    else:
        save_image(found.contact_sheet(samples.titles), path)
    print(f"{path}: {len(found.frames())} steps on the way")


def run(args: argparse.Namespace) -> int:
    """Sample, write, and print where."""
    from diffzoo.images import SUFFIXES, check_format

    check_format(args.out)
    if args.init is None and (args.mask is not None or args.strength is not None):
        raise UserError("--strength and --mask belong to --init IMAGE: say which image to begin with")
    if args.dir and any(p.suffix.lower() in SUFFIXES for p in Path(args.dir).glob("*")):
        raise UserError(f"{args.dir} holds images already: name a new folder, so that old and new are not mixed")
    from diffzoo.generation import pipeline
    from diffzoo.generation.seeds import bounded, parse_seeds

    seeds = parse_seeds(args.seeds)
    pipe = pipeline(args.source, args.device, classifier=args.classifier, preset=args.preset, weights=args.weights)
    print(f"weights: {pipe.metadata.provenance}")
    classes, count = args.classes, pipe.classes.count
    if classes is None and count:
        shown = min(count, DEFAULT_CLASSES)
        classes = [i * count // shown for i in range(shown)]
    bounded(len(classes or [0]) * len(seeds))
    larger = pipeline(args.upsample, args.device) if args.upsample else None
    if larger is not None and larger.generator.kind != "image":
        raise UserError(f"{args.upsample} does not enlarge images: --upsample takes a model such as adm_64_to_256")
    speed: Speed = {"progress": not args.quiet, "precision": args.precision, "batch_size": args.batch_size}
    options: Options = {"guidance": _guidance(args), "steps": args.steps, "sampler": args.sampler, **speed}
    begin = [option for option in ("init", "between", "around") if getattr(args, option) is not None]
    if begin:
        return _write(args, _edited(args, begin, pipe, classes, seeds, options))
    first = pipe.base or pipe
    trajectory = _trajectory(args, first.published.sampler(None if pipe.base else args.sampler, args.steps).steps)
    size = as_size(args.size, "--size") if args.size else None
    options["trajectory"] = trajectory
    samples = pipe(classes, seeds, compile=args.compile, size=size, **options)
    if trajectory is not None:
        _save_trajectory(trajectory, args.trajectory, samples)
    if larger is not None:
        each = [c for c in classes or () for _ in seeds]
        speed["batch_size"] = max(1, args.batch_size // 4)
        again = [record["seed"] for record in samples.records]
        samples = larger.upsample(samples, each, again, steps=args.upsample_steps, **speed)
    return _write(args, samples)


def _edited(
    args: argparse.Namespace,
    begin: list[str],
    pipe: "Pipeline",
    classes: list[str | int] | None,
    seeds: list[int],
    options: "Options",
) -> "Samples":
    """Samples that begin with an image, or between or around seeds."""
    clash = [f for f in ("upsample", "trajectory", "compile", "size") if getattr(args, f)] + begin[1:]
    if clash:
        raise UserError(f"--{begin[0]} and --{clash[0]} do not go together")
    if begin == ["init"]:
        return pipe.edit(args.init, classes, seeds, strength=args.strength, mask=args.mask, **options)
    if args.classes is not None and len(args.classes) > 1:
        raise UserError(f"--{begin[0]} takes one class or caption, got {len(args.classes)}")
    one = classes[0] if classes else None
    if begin == ["between"]:
        from diffzoo.generation.seeds import bounded

        bounded(args.frames)
        first, last = args.between
        return pipe.interpolate(first, last, one, frames=args.frames, **options)
    return pipe.variations(args.around, one, seeds, amount=args.amount, **options)


def _write(args: argparse.Namespace, samples: "Samples") -> int:
    rows = [label for label in samples.labels[:: samples.columns] if label]
    print(f"{samples.save_grid(args.out)}: {len(samples)} images" + (f", rows: {', '.join(rows)}" if rows else ""))
    if args.dir:
        print(f"{args.dir}: {len(samples.save_png(args.dir))} files")
    if args.npz:
        print(f"{samples.save_npz(args.npz)}: {len(samples)} images")
    return 0
