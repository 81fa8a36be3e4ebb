"""Options that verbs share: those that sample, and `diffzoo eval` and `diffzoo sweep`; and what they mean."""

import argparse
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError
from diffzoo.runs import Run
from diffzoo.sizes import as_size

if TYPE_CHECKING:
    from diffzoo.evaluation import EvalProtocol, RunOptions, SamplePlan
    from diffzoo.evaluation.model_images import ModelImages
    from diffzoo.zoo import Metadata

__all__ = [
    "default_out",
    "feature_weights",
    "open_model",
    "plan_arguments",
    "read_protocol",
    "run_options",
    "sampling_arguments",
    "shared_arguments",
]


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are sampled on this machine."""
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument("--precision", choices=["bf16", "fp16"], help="of the network; default: float32")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every verb that evaluates."""
    parser.add_argument("--protocol", help="such as adm-imagenet256, coco30k-val2014, edm2-fdd, demo; or a JSON file")
    parser.add_argument("--n", type=int, help="number of images, from the first seed on; default: the protocol's")
    parser.add_argument("--out", help="folder of results, where a killed run goes on; default: RUN/eval or eval/NAME")
    parser.add_argument("--reference", help="an .npz or .pkl, or a folder of real images; default: the protocol's own")
    networks = "weights of feature networks"
    parser.add_argument("--feature-weights", nargs="+", default=[], metavar="NETWORK=PATH", help=networks)
    parser.add_argument(
        "--processes", type=int, default=1, help="processes at once; no value depends on it (default: 1)"
    )
    parser.add_argument("--device", help="such as cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--block-size", type=int, help="images per block (default: 1000; for n below 5000: 100)")
    parser.add_argument("--few", action="store_true", help="allow fewer images than a network has features")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that make a plan; defaults are those published with the weights."""
    parser.add_argument("--plan", help="a plan as JSON, for example the `plan` of an earlier result")
    parser.add_argument("--preset", help="a published way to sample, such as guided: see `diffzoo describe MODEL`")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--sampler", help="name of a sampler, such as DDIM")
    parser.add_argument("--guidance", type=float, help="strength, in the formula that belongs to the weights")
    parser.add_argument("--weak", metavar="MODEL", help="autoguidance: away from this weaker model")
    parser.add_argument("--classifier", help="a noise-aware classifier that does the guidance: adm_classifier_256")
    parser.add_argument("--seed", type=int, help="of the first image (default: 0)")
    parser.add_argument("--labels", choices=["balanced", "uniform", "none"], help="rule of the class labels")
    parser.add_argument("--classes", nargs="+", type=int, metavar="INDEX", help="sample these classes only")
    parser.add_argument("--captions", help="text file, one caption per line, for text-to-image models")
    precisions = ["fp32", "tf32", "bf16", "fp16"]
    parser.add_argument("--precision", choices=precisions, help="of the network (default: fp32, with all digits)")
    parser.add_argument("--size", metavar="HxW", help="height and width of the samples, 96x64; default: the model's")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    parser.add_argument("--compile", action="store_true", default=None, help="compile the network")


def default_out(target: str, folder: str = "eval") -> str:
    """Where results of a model or of images go: into the run, if it is one, else into a folder with its name, so that
    two models do not write over each other."""
    if Run(Path(target)).exists:
        return str(Path(target) / folder)
    return str(Path(folder) / re.sub(r"[^A-Za-z0-9.-]+", "_", target).strip("_."))


def feature_weights(args: argparse.Namespace) -> dict[str, str]:
    """The `NETWORK=PATH` pairs of --feature-weights."""
    wrong = [p for p in args.feature_weights if "=" not in p]
    if wrong:
        raise UserError(
            f"expected --feature-weights NETWORK=PATH, such as inception-2015=weights.pth, got {wrong[0]!r}"
        )
    return dict(p.split("=", 1) for p in args.feature_weights)


def run_options(args: argparse.Namespace, device: str, **more: Any) -> "RunOptions":
    """Speed and place of an evaluation."""
    from diffzoo.evaluation import RunOptions

    return RunOptions(
        out=args.out,
        processes=args.processes,
        device=device,
        block_size=args.block_size,
        weights=feature_weights(args),
        few=args.few,
        progress=not args.quiet,
        **more,
    )


def read_protocol(args: argparse.Namespace) -> "EvalProtocol":
    """The protocol of a name or file, with the flags on top."""
    from diffzoo.evaluation import PROTOCOLS, EvalProtocol, protocol

    if not args.protocol and getattr(args, "images", None) and args.reference:
        args.protocol = "folders"
    if not args.protocol:
        raise UserError("which protocol? Give --protocol; known: " + ", ".join(PROTOCOLS))
    if args.protocol.endswith(".json"):
        found = EvalProtocol.from_dict(read_json(args.protocol, "protocol"))
    else:
        found = protocol(args.protocol)
    metrics = getattr(args, "metrics", None)
    if metrics:
        found = replace(found, metrics=tuple(metrics))
    return found if args.n is None else replace(found, n=args.n)


def read_json(path: str, key: str) -> dict[str, Any]:
    """A JSON object, or that part of a result."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"could not read the {key} {path}: {error}") from error
    found = data.get(key, data) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no {key}: expected a JSON object")
    return found


def _planned(args: argparse.Namespace, weights: str | None, metadata: "Metadata", plan: "SamplePlan") -> "SamplePlan":
    """A plan with the flags on top."""
    from diffzoo.record import from_plain
    from diffzoo.sampling import Sampler

    flags = {
        "first_seed": args.seed,
        "labels": args.labels,
        "classes": tuple(args.classes) if args.classes else None,
        "precision": args.precision,
        "compile": args.compile,
        "weights": weights,
        "images_per_batch": args.batch_size,
        "size": as_size(args.size, "--size") if args.size else None,
    }
    plan = replace(plan, **{k: v for k, v in flags.items() if v is not None})
    steps = plan.sampler.steps if args.steps is None else args.steps
    if args.sampler:
        asked = {"class": args.sampler, "steps": steps, "grid": plan.sampler.grid}
        sampler: Sampler = from_plain(Sampler, asked, "--sampler")  # type: ignore[type-abstract]
    else:
        sampler = replace(plan.sampler, steps=steps)
    return _guided(args, metadata, replace(plan, sampler=sampler))


def _guided(args: argparse.Namespace, metadata: "Metadata", plan: "SamplePlan") -> "SamplePlan":
    """A plan with the guidance that the flags ask for."""
    from diffzoo.generation.guidance import ByClassifier, ByWeakerModel
    from diffzoo.sampling import Guidance

    if args.classifier:
        from diffzoo.zoo import load_any

        scale = args.guidance
        if scale is None:
            scale = metadata.published_scale(load_any(args.classifier).metadata)
        labels = plan.labels if plan.labels != "none" else args.labels or "balanced"
        return replace(plan, guidance=ByClassifier(args.classifier, 1.0 if scale is None else scale), labels=labels)
    guidance = plan.guidance
    if args.guidance is not None:
        guidance = replace(guidance or Guidance(1.0), scale=args.guidance)
    if args.weak:
        if args.guidance is None and getattr(guidance, "weak", None) != args.weak:
            raise UserError("--weak says what to guide away from; --guidance says how much, for example --guidance 2")
        if not isinstance(guidance, Guidance):
            raise UserError("--weak and guidance by a classifier do not go together")
        known = {f.name: getattr(guidance, f.name) for f in fields(Guidance)}
        guidance = ByWeakerModel(**known, weak=args.weak)
    return replace(plan, guidance=guidance)


def _captions(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"could not read the captions {path}: {reason}") from error


def open_model(args: argparse.Namespace, device: str, weights: str | None) -> "ModelImages":
    """The images of a model, its network loaded; `weights` of its checkpoint, None = those of the plan."""
    from diffzoo.evaluation import SamplePlan
    from diffzoo.evaluation.model_images import ModelImages
    from diffzoo.generation import Generator
    from diffzoo.generation.plan import default_plan
    from diffzoo.zoo import load_any

    captions, model = _captions(args.captions), args.target[0]
    given = SamplePlan.from_dict({**read_json(args.plan, "plan"), "model": model}) if args.plan else None
    if weights and "=" in weights:
        raise UserError(f"weights of feature networks are given by --feature-weights {weights}")
    loaded = load_any(model, weights=weights or (given.weights if given else "ema"))
    print(f"weights: {loaded.metadata.provenance}")
    plan = _planned(args, weights, loaded.metadata, given or default_plan(model, loaded.metadata, args.preset))
    return ModelImages(plan, device, captions, Generator.of(loaded, device))
