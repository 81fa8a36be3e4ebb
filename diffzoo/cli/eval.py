"""`diffzoo eval MODEL --protocol P`, `diffzoo eval --images FOLDER_OR_NPZ --protocol P`, `diffzoo eval compare A B`."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffzoo.errors import UserError

if TYPE_CHECKING:
    from diffzoo.evaluation import EvalProtocol, Reference, SamplePlan

__all__ = [
    "configure",
    "default_device",
    "default_out",
    "make_plan",
    "open_model",
    "open_reference",
    "parse_weights",
    "plan_arguments",
    "read_protocol",
    "run",
    "shared_arguments",
]

PER_CLASS = 100  # of the demo's reference: its classes are unequal, the plan draws them equally often


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every verb that evaluates."""
    parser.add_argument("--protocol", help="such as adm-imagenet256, coco30k-val2014, edm2-fdd, demo; or a JSON file")
    parser.add_argument("--n", type=int, help="number of images; default: the protocol's. Seeds are prefixes")
    parser.add_argument(
        "--out", help="folder of blocks and results, where a killed run goes on; default: in the run, else eval/NAME"
    )
    parser.add_argument("--reference", help="reference .npz; default: the protocol's, in diffzoo's cache")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=PATH", help="weights of feature networks")
    parser.add_argument("--processes", type=int, default=1, help="how many work at once; changes no value (default: 1)")
    parser.add_argument("--device", help="such as cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--block-size", type=int, help="images per block (default: 1000; for n below 5000: 100)")
    parser.add_argument("--few", action="store_true", help="allow fewer images than features")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that make a plan; defaults are those published with the weights."""
    parser.add_argument("--plan", help="a plan as JSON, for example the `plan` of an earlier result")
    parser.add_argument("--setting", help="a published way to draw, such as guided: see `diffzoo describe MODEL`")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--sampler", help="name of a sampler, such as DDIM")
    parser.add_argument("--guidance", type=float, help="strength, in the formula that belongs to the weights")
    parser.add_argument("--weak", metavar="MODEL", help="autoguidance: away from this weaker model")
    parser.add_argument("--classifier", help="a noise-aware classifier that does the guidance: adm_classifier_256")
    parser.add_argument("--seed", type=int, help="of the first image (default: 0)")
    parser.add_argument("--labels", choices=["balanced", "uniform", "none"], help="rule of the class labels")
    parser.add_argument("--classes", nargs="+", type=int, metavar="INDEX", help="draw these classes only")
    parser.add_argument("--captions", help="text file, one caption per line, for text-to-image models")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16", "fp16"], help="of the network (default: fp32, with all digits)"
    )
    parser.add_argument("--batch-size", type=int, help="images at a time")
    parser.add_argument("--compile", action="store_true", default=None, help="compile the network")
    parser.add_argument("--average", help="weights of a checkpoint: average (default), raw, a label")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("target", nargs="*", help="a model; or: compare RESULT.json RESULT.json")
    shared_arguments(parser)
    plan_arguments(parser)
    parser.add_argument("--images", help="evaluate a folder of images or an .npz file instead of a model")
    parser.add_argument("--metrics", nargs="+", help="instead of the protocol's: a protocol of its own")
    parser.add_argument("--keep-images", action="store_true", help="keep the images, as OUT/samples.npz")
    parser.add_argument("--memorisation", metavar="FOLDER_OR_NPZ", help="look for copies of these training images")


def run(args: argparse.Namespace) -> int:
    """Evaluate or compare, and print the values."""
    if args.target[:1] == ["compare"]:
        return _compare(args.target[1:])
    if len(args.target) + bool(args.images) != 1:
        raise UserError("expected one model, or --images FOLDER_OR_NPZ, or: compare RESULT.json RESULT.json")
    if not args.protocol:
        raise UserError("which protocol? Give --protocol; known: " + ", ".join(_presets()))
    from diffzoo.evaluation import Settings, evaluate
    from diffzoo.evaluation.pictures import open_images
    from diffzoo.evaluation.run import result_path

    protocol = read_protocol(args)
    device = default_device(args.device)
    args.out = args.out or default_out(args.images or args.target[0])
    source: Any = open_images(args.images) if args.images else open_model(args, device)
    size = int(source.images(0, 1).shape[-1]) if args.images else source.image_size
    protocol, reference = open_reference(protocol, args.reference, size)
    settings = Settings(
        out=args.out,
        processes=args.processes,
        device=device,
        block_size=args.block_size,
        weights=parse_weights(args.weights),
        few=args.few,
        keep_images=args.keep_images or bool(args.memorisation),
        progress=not args.quiet,
    )
    result = evaluate(source, protocol, reference, settings)
    print(result.table())
    for remark in result.remarks:
        print(f"note: {remark}")
    path = result_path(args.out, result.plan, result.protocol)
    print(f"{path}: protocol {result.protocol.sha256[:16]}")
    if args.memorisation:
        _memorisation(args, result)
    return 0


def _presets() -> list[str]:
    from diffzoo.evaluation import PRESETS

    return list(PRESETS)


def _compare(paths: list[str]) -> int:
    from diffzoo.evaluation import Result, compare

    if len(paths) != 2:
        raise UserError(f"compare needs two results, got {len(paths)}: diffzoo eval compare A.json B.json")
    print(compare(Result.load(paths[0]), Result.load(paths[1]), (paths[0], paths[1])))
    return 0


def default_device(device: str | None) -> str:
    """The device asked for, else a GPU if there is one."""
    from diffzoo.pipelines import device_of

    return str(device_of(device))


def default_out(target: str, folder: str = "eval") -> str:
    """Where results of a model or of images go: into the run, if it is one, else into a folder with its name, so that
    two models do not write over each other."""
    if (Path(target) / "checkpoints").is_dir():
        return str(Path(target) / folder)
    return str(Path(folder) / re.sub(r"[^A-Za-z0-9.-]+", "_", target).strip("_."))


def parse_weights(pairs: list[str]) -> dict[str, str]:
    """`NETWORK=PATH` pairs as a dictionary."""
    wrong = [p for p in pairs if "=" not in p]
    if wrong:
        raise UserError(f"expected --weights NETWORK=PATH, such as inception-2015=weights.pth, got {wrong[0]!r}")
    return dict(p.split("=", 1) for p in pairs)


def read_protocol(args: argparse.Namespace) -> "EvalProtocol":
    """The protocol of a preset or file, with the flags on top."""
    from diffzoo.evaluation import EvalProtocol, preset

    if args.protocol.endswith(".json"):
        protocol = EvalProtocol.from_dict(_read_json(args.protocol, "protocol"))
    else:
        protocol = preset(args.protocol)
    metrics = getattr(args, "metrics", None)
    if metrics:
        protocol = protocol.with_(metrics=tuple(metrics))
    return protocol if args.n is None else protocol.with_(n=args.n)


def _read_json(path: str, key: str) -> dict[str, Any]:
    """A JSON object, or that part of a result."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"could not read the {key} {path}: {error}") from error
    found = data.get(key, data) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no {key}: expected a JSON object")
    return found


def make_plan(args: argparse.Namespace, metadata: Any) -> "SamplePlan":
    """The plan from a file or from the facts of the weights, with the flags on top."""
    from dataclasses import replace

    from diffzoo.evaluation import SamplePlan
    from diffzoo.evaluation.generate import default_plan

    plan = default_plan(args.target[0], metadata, args.setting)
    if args.plan:
        plan = SamplePlan.from_dict({**_read_json(args.plan, "plan"), "model": args.target[0]})
    flags = {
        "steps": args.steps,
        "first_seed": args.seed,
        "labels": args.labels,
        "classes": tuple(args.classes) if args.classes else None,
        "precision": args.precision,
        "compile": args.compile,
        "average": args.average,
        "images_per_batch": args.batch_size,
        "sampler": {"class": args.sampler} if args.sampler else None,
    }
    plan = replace(plan, **{k: v for k, v in flags.items() if v is not None})
    if args.classifier:
        from diffzoo.zoo import load_any
        from diffzoo.zoo.settings import published_scale

        known = (
            published_scale(metadata, load_any(args.classifier).metadata) if args.guidance is None else args.guidance
        )
        labels = plan.labels if plan.labels != "none" else args.labels or "balanced"
        guidance = {"classifier": args.classifier, "scale": 1.0 if known is None else known}
        return replace(plan, guidance=guidance, labels=labels)
    changed = {k: v for k, v in (("scale", args.guidance), ("weak", args.weak)) if v is not None}
    if "weak" in changed and (plan.guidance or {}).get("weak") != args.weak and args.guidance is None:
        raise UserError("--weak says what to guide away from; --guidance says how much, for example --guidance 2")
    if changed:
        plan = replace(plan, guidance={**(plan.guidance or {"formula": "uncond"}), **changed})
    return plan


def open_model(args: argparse.Namespace, device: str) -> Any:
    """The images of a model, its network loaded."""
    from diffzoo.evaluation.generate import ModelImages
    from diffzoo.pipelines import pipeline
    from diffzoo.zoo import load_any

    captions: list[str] = []
    if args.captions:
        try:
            captions = Path(args.captions).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise UserError(f"could not read the captions {args.captions}: {reason}") from error
    average = args.average or (_read_json(args.plan, "plan").get("average") if args.plan else None) or "average"
    pipe = pipeline(args.target[0], device, prefer=average)
    plan = make_plan(args, pipe.metadata)
    if classifier := (plan.guidance or {}).get("classifier"):
        pipe.guide_with(load_any(classifier))
    source = ModelImages(plan, device, captions)
    source.__dict__["pipe"] = pipe  # loaded once: the cached property of the source
    return source


# -- the demo's reference


def open_reference(protocol: "EvalProtocol", path: str | None, size: int) -> "tuple[EvalProtocol, Reference]":
    """The reference of a protocol; that of the demo is made from the demo set where it is missing."""
    from diffzoo.evaluation import find_reference
    from diffzoo.evaluation.reference import reference_folder

    if protocol.name != "demo" or path is not None:
        return protocol, find_reference(protocol.reference, path)
    protocol = protocol.with_(reference=f"diffzoo-demo-{size}", image_size=size)
    file = reference_folder() / f"{protocol.reference}.npz"
    if not file.exists():
        _make_demo_reference(file, size)
    return protocol, find_reference(protocol.reference)


def _make_demo_reference(path: Path, size: int) -> None:
    from diffzoo.data.demo import DemoData
    from diffzoo.evaluation import make_reference
    from diffzoo.metrics import load_features

    class Whole(DemoData):
        """The training rows, each once and in order, through the loader that validation has."""

        def open_source(self, part: Any) -> Any:
            return super().open_source("train")

    batches = Whole(image_size=size, num_workers=0).val_dataloader()
    make_reference(_equal_classes(batches), [load_features("random-conv")], path)


def _equal_classes(batches: Any) -> Iterator[dict[str, Any]]:
    """The first pictures of each class, as many of each as there are, up to PER_CLASS."""
    seen: dict[int, int] = {}
    for batch in batches:
        keep = []
        for i, label in enumerate(batch["label"].tolist()):
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= PER_CLASS:
                keep.append(i)
        if keep:
            yield {"image": batch["image"][keep], "label": batch["label"][keep]}


# -- memorisation


def _memorisation(args: argparse.Namespace, result: Any) -> None:
    from diffzoo.evaluation.memorisation import report
    from diffzoo.evaluation.pictures import NpzImages, open_images

    network = result.protocol.networks[0].name
    found = report(
        NpzImages(str(Path(args.out) / "samples.npz")),
        open_images(args.memorisation),
        network,
        Path(args.out) / "memorisation",
        weights=parse_weights(args.weights).get(network),
        device=default_device(args.device),
    )
    print(found.summary())
