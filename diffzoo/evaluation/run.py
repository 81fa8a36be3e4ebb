"""`evaluate`: generate, extract, measure, record."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffzoo.errors import UserError
from diffzoo.evaluation.blocks import Blocks, Job
from diffzoo.evaluation.image_files import FolderImages, ImagesPlan, NpzImages, write_npz
from diffzoo.evaluation.measure import GROUPS, Features, check_count, check_reference, measure, metric_of
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.evaluation.protocols import EvalProtocol, NetworkSpec
from diffzoo.evaluation.reference import Reference
from diffzoo.evaluation.result import Result, hardware, software_versions
from diffzoo.generation.generator import ImageSource
from diffzoo.generation.plan import SamplePlan, labels_of
from diffzoo.metrics.features import FeatureNetwork, load_features

__all__ = ["RunOptions", "evaluate", "load_networks", "resolve", "result_path"]


@dataclass(frozen=True)
class RunOptions:
    """What changes speed and place but not the values.

    Args:
        out: folder of blocks and result; a second run with the same folder goes on where the first stopped.
        processes: how many work at once; on GPUs each takes the next.
        device: "cpu" or "cuda".
        block_size: images per block; None = 1,000, or 100 where a protocol has fewer than 5,000 images. A run that goes
            on, or takes the images of a longer one, needs the blocks of that one's size.
        features_per_batch: pictures in one call of a feature network.
        weights: paths of feature weights by network name.
        groups: groups of seeds for standard errors; 0 = none.
        few: allow fewer images than features.
        keep_images: keep the pixels, and write `samples.npz`.
        progress: show a bar.
    """

    out: str | os.PathLike[str] = "eval"
    processes: int = 1
    device: str = "cpu"
    block_size: int | None = None
    features_per_batch: int = 50
    weights: Mapping[str, str] = field(default_factory=dict)
    groups: int = GROUPS
    few: bool = False
    keep_images: bool = False
    progress: bool = False


def load_networks(
    metrics: Sequence[str], weights: Mapping[str, str] | None = None, device: str = "cpu"
) -> dict[str, FeatureNetwork]:
    """The feature networks that some metrics need, by name.

    Raises:
        UserError: for unknown metrics, and missing weights: says the three ways to get them.
    """
    names = list(dict.fromkeys(metric_of(m).network for m in metrics))
    weights = weights or {}
    return {name: load_features(name, weights.get(name), device) for name in names}


def resolve(protocol: EvalProtocol, reference: Reference, networks: Mapping[str, FeatureNetwork]) -> EvalProtocol:
    """The protocol with the hashes of what it is really measured with.

    Raises:
        UserError: if the protocol pins other hashes: a reference or feature network of another kind.
    """
    if protocol.reference_sha256 not in (None, reference.sha256):
        raise UserError(
            f"reference mismatch: protocol {protocol.name} was made for the reference {protocol.reference_sha256}, "
            f"but {reference.path} has {reference.sha256}"
        )
    pinned = {spec.name: spec for spec in protocol.networks}
    specs = []
    for name, network in networks.items():
        scored = any(metric_of(m)[1:] == (name, "logits") for m in protocol.metrics)
        spec = NetworkSpec(name, network.rule, network.weights_sha256(), network.head_sha256() if scored else None)
        wanted = pinned.get(name, NetworkSpec(name))
        for what in ("weights_sha256", "head_sha256"):
            if getattr(wanted, what) not in (None, getattr(spec, what)):
                raise UserError(
                    f"protocol {protocol.name} was made with {what} {getattr(wanted, what)} of {name}, "
                    f"but the weights found have {getattr(spec, what)}"
                )
        specs.append(spec)
    return replace(protocol, reference_sha256=reference.sha256, networks=tuple(specs))


def _check_source(source: Any, protocol: EvalProtocol) -> None:
    if isinstance(source, (FolderImages, NpzImages)) and len(source) < protocol.n:
        raise UserError(
            f"{source.path} holds {len(source)} images and protocol {protocol.name} needs {protocol.n}, because the "
            f"bias of its values depends on their number: give more, or pass --n {len(source)}, a protocol of its own"
        )


def _scored_captions(source: Any, protocol: EvalProtocol) -> tuple[list[str], list[str]]:
    """The networks that score captions, and the captions; raises if there are too few."""
    names = sorted({metric_of(m).network for m in protocol.metrics if metric_of(m).kind == "clip-score"})
    captions = list(getattr(source, "captions", ()))[: protocol.n]
    if names and len(captions) < protocol.n:
        raise UserError(
            f"CLIPScore needs one caption per image: expected {protocol.n}, got {len(captions)}; give --captions FILE, "
            "one per line, or leave clip_score out of --metrics"
        )
    return names, captions


def evaluate(
    source: ImageSource | SamplePlan, protocol: EvalProtocol, reference: Reference, options: RunOptions | None = None
) -> Result:
    """Evaluate images by a protocol.

    Blocks of seeds are written to `options.out/blocks`; the result to `options.out`. Values
    do not depend on the number of processes, nor on having been killed and run again. See `result_path` for its name.

    Args:
        source: a plan, or a folder, a file, or any other source of images.
        protocol: how to measure; a preset with its `n` changed, for example.
        reference: what to measure against.
        options: speed and place.

    Raises:
        UserError: for whatever does not fit; one sentence.
    """
    options = options or RunOptions()
    if options.processes < 1:
        raise UserError(f"processes must be at least 1, got {options.processes}")
    started = time.perf_counter()
    if isinstance(source, SamplePlan):
        source = ModelImages(source, options.device)
    _check_source(source, protocol)
    networks = load_networks(protocol.metrics, options.weights, options.device)
    scorers, captions = _scored_captions(source, protocol)
    remarks = check_count(protocol, networks, options.few) + check_reference(protocol, reference, networks)
    protocol = resolve(protocol, reference, networks)
    plan = source.plan()
    size = options.block_size
    if size is None:
        size = 1000 if protocol.n >= 5000 else 100
    made_with = {k: v for k, v in software_versions().items() if k in ("diffzoo", "torch")}
    made_with["device"] = hardware(options.device)
    blocks = Blocks(Path(options.out) / "blocks", plan, protocol, size, made_with)
    _check_first(source, protocol, reference)
    weights = tuple((name, options.weights.get(name)) for name in networks)
    job = Job(source, protocol, weights, options.device, options.features_per_batch, options.keep_images)
    made = blocks.fill(job, options.processes, options.progress)
    generated = time.perf_counter()
    embedded = {name: networks[name].embed_captions(captions) for name in scorers}  # type: ignore[operator]
    features = Features(blocks.gather(), embedded)
    values = measure(protocol, features, reference, networks, groups=options.groups, device=options.device)
    timing = {
        "images_made": float(made),
        "generate_seconds": generated - started,
        "measure_seconds": time.perf_counter() - generated,
    }
    result = Result(plan, protocol, values, remarks, device=hardware(options.device), timing=timing)
    result.save(result_path(options.out, plan, protocol))
    if options.keep_images:
        _write_samples(source, blocks, Path(options.out) / "samples.npz")
    return result


def result_path(out: str | os.PathLike[str], plan: SamplePlan | ImagesPlan, protocol: EvalProtocol) -> Path:
    """Where the result of a resolved plan and protocol lies: `<protocol>_<n>.json` in `out`; with the hashes in its
    name if the result of another plan or protocol lies there already, which is kept."""
    path = Path(out) / f"{protocol.name}_{protocol.n}.json"
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        theirs = (other["plan_sha256"], other["protocol_sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # nothing there, or nothing worth keeping
        return path
    if theirs == (plan.sha256, protocol.sha256):
        return path
    return path.with_stem(f"{path.stem}_{plan.sha256[:8]}_{protocol.sha256[:8]}")


def _check_first(source: ImageSource, protocol: EvalProtocol, reference: Reference) -> None:
    """What is wrong with the first image is wrong with all: better known before hours of sampling."""
    size = protocol.image_size
    if isinstance(source, ModelImages):
        own = source.image_size
        if size is not None and own != size and protocol.resize == "none":
            raise UserError(
                f"the model draws {own} x {own} pixels and protocol {protocol.name} measures {size} x {size}: "
                "choose the protocol of that resolution"
            )
        reference.check_size(size or own)
    elif isinstance(source, (FolderImages, NpzImages)):
        reference.check_size(size or int(source.images(0, 1).shape[-1]))


def _write_samples(source: Any, blocks: Blocks, path: Path) -> None:
    labels = None
    if isinstance(source, ModelImages):
        labels = labels_of(source.sample_plan, source.num_classes, 0, blocks.protocol.n)
    write_npz(path, blocks.pixels(), blocks.protocol.n, labels)
