"""`evaluate`: generate, extract, measure, record."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffzoo.errors import UserError
from diffzoo.evaluation.blocks import Blocks, Job
from diffzoo.evaluation.checks import captions_of, check, scorers
from diffzoo.evaluation.image_files import FolderImages, ImagesPlan, NpzImages
from diffzoo.evaluation.measure import GROUPS, HELD_OUT, Features, held_out_distances, measure, metric_of
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.evaluation.protocols import EvalProtocol
from diffzoo.evaluation.reference import Reference, reference_of
from diffzoo.evaluation.result import Result, hardware, software_versions
from diffzoo.generation.generator import ImageSource, device_of
from diffzoo.generation.plan import SamplePlan, labels_of
from diffzoo.images import write_npz
from diffzoo.metrics.features import FeatureNetwork, load_features
from diffzoo.runs import is_first_process

__all__ = ["RunOptions", "evaluate", "load_networks", "result_path"]


@dataclass(frozen=True)
class RunOptions:
    """What changes speed and place but not the values.

    Args:
        out: folder of blocks and result; a second run with the same folder goes on where the first stopped.
        processes: how many work at once; on GPUs each takes the next.
        device: "cpu" or "cuda".
        block_size: images per block; None = 1,000, or 100 where a protocol has fewer than 5,000 images. A run that goes
            on, or takes the images of a longer one, needs the blocks of that one's size.
        features_per_batch: images in one call of a feature network.
        weights: paths of feature weights by network name.
        groups: groups of seeds for standard errors; 0 = none.
        few: allow fewer images than features.
        keep_images: keep the pixels, and write `samples.npz`.
        progress: show a bar; None = in notebooks alone.
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
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("block_size", 1), ("groups", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: expected at least {least}, got {value}")


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


def evaluate(
    source: ImageSource | SamplePlan,
    protocol: EvalProtocol,
    reference: Reference | FolderImages,
    options: RunOptions | None = None,
    held_out: FolderImages | NpzImages | None = None,
) -> Result:
    """Evaluate images by a protocol.

    Blocks of seeds are written to `options.out/blocks`; the result to `options.out`. Values
    do not depend on the number of processes, nor on having been killed and run again. See `result_path` for its name.
    Processes of torchrun or srun, on one machine or several that share the folder, share the blocks; every one returns
    the result, and the first writes it.

    Args:
        source: a plan, or a folder, a file, or any other source of images.
        protocol: how to measure; a named one with its `n` changed, for example.
        reference: what to measure against; statistics of a folder are made and kept.
        options: speed and place.
        held_out: real images that Fréchet ratios are relative to, where the protocol does not hold their distances.

    Raises:
        UserError: for whatever does not fit; one sentence.
    """
    options = options or RunOptions()
    options = replace(options, device=str(device_of(options.device)))
    if Path(options.out).is_file():
        raise UserError(f"{options.out} is a file: results need a folder")
    started = time.perf_counter()
    if isinstance(source, SamplePlan):
        source = ModelImages(source, options.device)
    networks = load_networks(protocol.metrics, options.weights, options.device)
    if not isinstance(reference, Reference):
        reference = reference_of(reference, list(networks.values()), options.progress)
    if held_out is not None:
        known = held_out_distances(held_out, protocol.metrics, reference, networks)
        protocol = replace(protocol, settings={**protocol.settings, HELD_OUT: known})
    protocol, remarks = check(source, protocol, reference, networks, options.few)
    plan = source.plan()
    size = options.block_size or (1000 if protocol.n >= 5000 else 100)
    made_with = {k: v for k, v in software_versions().items() if k in ("diffzoo", "torch")}
    made_with["device"] = hardware(options.device)
    blocks = Blocks(Path(options.out) / "blocks", plan, protocol, size, made_with)
    weights = tuple((name, options.weights.get(name)) for name in networks)
    job = Job(source, protocol, weights, options.device, options.features_per_batch, options.keep_images)
    made = blocks.fill(job, options.processes, options.progress)
    generated = time.perf_counter()
    captions = captions_of(source, protocol)
    embedded = {name: networks[name].embed_captions(captions) for name in scorers(protocol)}  # type: ignore[operator]
    features = Features(blocks.gather(), embedded)
    values = measure(protocol, features, reference, networks, groups=options.groups, device=options.device)
    timing = {
        "images_made": float(made),
        "generate_seconds": generated - started,
        "measure_seconds": time.perf_counter() - generated,
    }
    result = Result(plan, protocol, values, remarks, device=hardware(options.device), timing=timing)
    if not is_first_process():
        return result
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


def _write_samples(source: ImageSource, blocks: Blocks, path: Path) -> None:
    labels = None
    if isinstance(source, ModelImages):
        labels = labels_of(source.sample_plan, source.num_classes, 0, blocks.protocol.n)
    write_npz(path, blocks.pixels(), blocks.protocol.n, labels)
